"""Compacter: numbers of the authors' own layers, the equation written a second time with torch.kron, where adapters
stand, how they start."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from dropped_hosts import assert_same, filled, train
from torch import Tensor, nn

import peftcore
from peftcore.author import Replacement
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill
from peftcore.testing.tools import without_fast_paths

PHM = {"shared_rule": False, "factorized": False, "rule_std": 0.01}
PLACES = {
    "llama": ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"],
    "bert": ["bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"],
    "t5": [
        "encoder.block.{}.layer.0.SelfAttention.o",
        "encoder.block.{}.layer.1.DenseReluDense.wo",
        "decoder.block.{}.layer.0.SelfAttention.o",
        "decoder.block.{}.layer.2.DenseReluDense.wo",
    ],
    "encoder": ["encoder.layers.{}.self_attn", "encoder.layers.{}.linear2"],
}


# Three steps from rules of 1e-4 change less than single precision can tell.
@conformance("compacter", options={"*": {"bottleneck": 4, "rule_std": 0.1}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


NUMBERS = Path(__file__).parent / "numbers" / "compacter.json"
CODE: Any = {"repository": "rabeehk/compacter", "commit": "e123daa", "script": "seq2seq/hypercomplex/layers.py"}
AUTHORS = {"compacter": {"rank": 2}, "phm": PHM}


@pytest.mark.parametrize("variant", AUTHORS)
@against("authors", "compacter", **CODE)
def test_the_authors_numbers(variant: str) -> None:
    """Outputs, and the gradient of the rules: of the shared ones, or of the first matrix'."""
    options, numbers = AUTHORS[variant], frozen(NUMBERS)[variant]
    model = nn.Sequential(nn.Linear(6, 6, bias=False)).double().requires_grad_(False)
    model[0].weight.copy_(torch.eye(6))
    injection = peftcore.apply(model, "compacter", target="0", bottleneck=4, phm_dim=2, dtype="float64", **options)
    operator = injection.operators["0"]
    with torch.no_grad():
        shared = [module.value for module in injection.shared.values()]
        for rule in shared:
            rule.copy_(wave(rule, 0.7))
        k = 1.0
        for part in (operator.down, operator.up):
            for tensor in ([] if shared else [part.rule.value]) + [part.left, part.right, part.bias]:
                if tensor is not None:
                    k += 0.3
                    tensor.copy_(wave(tensor, k))
    y = model(wave(torch.empty(1, 6), 0.4))
    y.square().sum().backward()
    assert y.flatten().tolist() == pytest.approx(numbers["outputs"], abs=1e-10)
    (rule,) = shared or [operator.down.rule.value]
    assert rule.grad.flatten().tolist() == pytest.approx(numbers["rule"], abs=1e-10)


def host(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model, inputs = HOSTS[name].build()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    return model.double().eval().requires_grad_(False), lambda each: HOSTS[name].output(each(**inputs))


def matrix(rules: Tensor, tensors: dict[str, Tensor], part: str) -> Tensor:
    left, right = tensors[f"{part}.left"], tensors.get(f"{part}.right")
    blocks = left if right is None else [a @ b for a, b in zip(left, right, strict=True)]
    return sum(torch.kron(rule, block) for rule, block in zip(rules, blocks, strict=True))


def hook(shared: Tensor | None, tensors: dict[str, Tensor]) -> Callable[..., Any]:
    def change(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        down, up = (
            matrix(tensors[f"{part}.rule.value"] if shared is None else shared, tensors, part)
            for part in ("down", "up")
        )
        z = h @ down + tensors["down.bias"]
        z = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
        y = h + z @ up + tensors["up.bias"]
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return change


@pytest.mark.parametrize("options", [{}, {"rank": 3, "phm_dim": 2}, {"shared_rule": False}, PHM])
@pytest.mark.parametrize("name", PLACES)
def test_equation_on_hosts(name: str, options: dict[str, Any]) -> None:
    base, run = host(name)
    model = deepcopy(base)
    injection = peftcore.apply(model, "compacter", bottleneck=8, train_layer_norm=False, dtype="float64", **options)
    places = [place.format(layer) for layer in (0, 1) for place in PLACES[name]]
    assert sorted(injection.operators) == sorted(places)
    fill(injection)
    before = run(base)
    rules = [module.value.detach().clone().requires_grad_() for module in injection.shared.values()]
    assert len(rules) == options.get("shared_rule", True)
    pairs = list(zip([module.value for module in injection.shared.values()], rules, strict=True))
    for place in places:
        named = dict(injection.operators[place].named_parameters())
        tensors = {key: p.detach().clone().requires_grad_() for key, p in named.items()}
        base.get_submodule(place).register_forward_hook(hook(rules[0] if rules else None, tensors))
        pairs += [(named[key], tensors[key]) for key in named]
    with without_fast_paths():
        ours, expected = run(model), run(base)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for mine, other in pairs:
        assert other.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("joins", ["matrix", "stream"])
def test_training_with_the_hosts_dropout(joins: str) -> None:
    """The authors' T5 drops what the adapter returns; in the adapters package it adapts what was dropped."""
    base, run = host("t5")
    model, bare = deepcopy(base), deepcopy(base)
    options = {} if joins == "matrix" else {"joins": joins}
    injection = peftcore.apply(
        model, "compacter", bottleneck=8, train_layer_norm=False, shared_rule=False, dtype="float64", **options
    )
    copies = filled(injection)
    for path, tensors in copies.items():
        end = path.rsplit(".", 2)[0] + ".dropout" if joins == "stream" else path
        base.get_submodule(end).register_forward_hook(hook(None, tensors))
    assert_same(injection, copies, (train(model), train(base)), run, train(bare))


def test_plus_plus_leaves_attention_out_and_all_norms_train() -> None:
    """L (2 q (d + r) + r + d) + n^3, and of T5's norms five a layer of both stacks and two final ones."""
    options = {"bottleneck": 8, "placement": "compacter_pp"}
    model, _ = host("t5")
    injection = peftcore.apply(model, "compacter", **options)
    adapters = {path for path, each in injection.operators.items() if not isinstance(each, Replacement)}
    assert adapters == {place.format(layer) for layer in (0, 1) for place in PLACES["t5"] if "Dense" in place}
    count = 4 * (2 * (16 + 8) + 8 + 16) + 4**3 + (2 * 5 + 2) * 16
    assert sum(p.numel() for p in injection.parameters()) == count
    assert peftcore.plan(host("t5")[0], "compacter", **options).trainable == count
    assert len([key for key in injection.state_dict() if "rule" in key]) == 1


def test_cross_attention_is_adapted_where_it_is_named() -> None:
    injection = peftcore.apply(host("t5")[0], "compacter", bottleneck=8, target="EncDecAttention.o")
    assert sum(not isinstance(each, Replacement) for each in injection.operators.values()) == 2


@against("authors", "compacter", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Of factors and biases, and of the blocks and rules of PHM. The shared rules are drawn by `rule_std`."""
    told, injection = frozen(NUMBERS, "start"), peftcore.apply(host("llama")[0], "compacter", bottleneck=4)
    linear: Any = type(injection.operators["model.layers.0.mlp.down_proj"].down)
    config = type(injection.config)
    one = linear(20_000, 40_000, config(), injection.shared["rule_4"])
    for tensor, name in ((one.left, "left"), (one.right, "right"), (one.bias, "bias")):
        same_start(tensor, told[name])
    phm = linear(80, 8000, config(phm_dim=40, bottleneck=40, **PHM), None)
    same_start(phm.left, told["blocks"])
    same_start(phm.rule.value, told["rules"])


@against("authors", "compacter", **CODE, part="trains")
def test_what_trains_of_the_model_is_what_the_authors_train() -> None:
    """The norms, beside the adapters and their rules."""
    injection = peftcore.apply(host("t5")[0], "compacter", bottleneck=4)
    norms = [each for each in injection.sites if isinstance(injection.operators[each.path], Replacement)]
    names = {f"{site.module_path}.{site.tensor}" for site in norms}
    assert {*names, "phm_rule"} == set(frozen(NUMBERS, "trains")) and list(injection.shared) == ["rule_4"]


@against("authors", "compacter", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    model = nn.TransformerEncoderLayer(32, 2, 8, batch_first=True)
    same_defaults(peftcore.apply(nn.TransformerEncoder(model, 1), "compacter").config, frozen(NUMBERS, "defaults"))


def test_a_fresh_one_is_near_the_identity() -> None:
    model, run = host("llama")
    before = run(model)
    injection = peftcore.apply(model, "compacter", bottleneck=2048, phm_dim=16, dtype="float64")
    (rule,) = injection.shared.values()
    assert abs(rule.value.std().item() / 1e-4 - 1) < 0.05 and abs(rule.value.mean().item()) < 1e-5
    injection.remove()
    peftcore.apply(model, "compacter", bottleneck=8, dtype="float64")
    assert 0 < (run(model) - before).abs().max() / before.abs().max() < 1e-5


def test_widths_must_be_multiples() -> None:
    with pytest.raises(ConfigError, match="not a multiple of phm_dim=4"):
        peftcore.apply(host("llama")[0], "compacter", bottleneck=6)
    with pytest.raises(UnsupportedSite, match="16 features are not a multiple of phm_dim=3"):
        peftcore.plan(host("llama")[0], "compacter", bottleneck=6, phm_dim=3)
