"""The Pfeiffer adapter: numbers of the adapters package, the equation as forward hooks on a copy of the host, and which
hosts count as post-norm."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters_package import assert_same_adapters
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance, frozen
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill
from peftcore.testing.tools import without_fast_paths

NUMBERS = Path(__file__).parent / "numbers" / "adapters_package.json"
# Feed-forwards, which name the adapters, and where these act.
PLACES = {
    "llama": [("model.layers.{}.mlp.down_proj", "model.layers.{}")],
    "gpt2": [("transformer.h.{}.mlp.c_proj", "transformer.h.{}")],
    "moe": [("model.layers.{}.mlp", "model.layers.{}")],
    "t5": [
        ("encoder.block.{}.layer.1.DenseReluDense.wo", "encoder.block.{}"),
        ("decoder.block.{}.layer.2.DenseReluDense.wo", "decoder.block.{}"),
    ],
    "vit": [("vit.layers.{}.mlp.fc2", "vit.layers.{}")],
    "bert": [("bert.encoder.layer.{}.output.dense", "bert.encoder.layer.{}.output.LayerNorm")],
    "encoder": [("encoder.layers.{}.linear2", "encoder.layers.{}.norm2")],
}
POST = {"bert", "encoder"}


@conformance("pfeiffer_adapter")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("name", ["bert", "llama"])
@against(
    "adapters 1.3",
    "pfeiffer_adapter",
    repository="adapter-hub/adapters",
    commit="88f18eb",
    script="src/adapters/methods/modeling.py",
)
def test_the_numbers_of_the_adapters_package(name: str) -> None:
    assert_same_adapters("pfeiffer_adapter", frozen(NUMBERS)["pfeiffer_adapter"], name)


def host(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model, inputs = HOSTS[name].build()
    if name == "moe":
        model.set_experts_implementation("eager")  # grouped products of torch have no float64
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    return model.double().eval().requires_grad_(False), lambda each: HOSTS[name].output(each(**inputs))


def added(tensors: dict[str, Tensor], u: Tensor) -> Tensor:
    inner = (u @ tensors["down.weight"].T + tensors["down.bias"]).clamp_min(0)
    return inner @ tensors["up.weight"].T + tensors["up.bias"]


def hook(tensors: dict[str, Tensor], post: bool) -> Callable[..., Any]:
    def behind(module: nn.Module, args: Any, output: Any) -> Any:
        if post:  # the norm's own formula, on what it read and the adapter
            x = args[0] + added(tensors, output)
            centered = x - x.mean(-1, keepdim=True)
            return (
                centered / (centered.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias
            )
        y = output[0] if isinstance(output, tuple) else output
        y = y + added(tensors, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return behind


@pytest.mark.parametrize("name", PLACES)
def test_equation_on_hosts(name: str) -> None:
    base, run = host(name)
    model = deepcopy(base)
    injection = peftcore.apply(model, "pfeiffer_adapter", bottleneck=5, dtype="float64")
    places = {key.format(layer): place.format(layer) for layer in (0, 1) for key, place in PLACES[name]}
    assert {graft.site.path: graft.holders[1].module_path for graft in injection.grafts} == places
    assert sum(p.numel() for p in injection.parameters()) == len(places) * (2 * 16 * 5 + 5 + 16)
    fill(injection)
    before = run(base)
    copies = {}
    for path, place in places.items():
        named = injection.operators[path].named_parameters()
        copies[path] = {key: p.detach().clone().requires_grad_() for key, p in named}
        base.get_submodule(place).register_forward_hook(hook(copies[path], name in POST))
    with without_fast_paths():
        ours, expected = run(model), run(base)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for path, tensors in copies.items():
        for key, p in injection.operators[path].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-8)


def test_a_branch_is_what_the_target_returns() -> None:
    """The bottleneck that later papers call so: the same numbers as Houlsby's at the feed-forward's last matrix."""
    model, run = host("bert")
    other = deepcopy(model)
    options = {"bottleneck": 5, "activation": "relu", "dtype": "float64"}
    ours = peftcore.apply(model, "pfeiffer_adapter", placement="branch", **options)
    houlsby = peftcore.apply(other, "houlsby_adapter", target="mlp.output", train_layer_norm=False, **options)
    fill(ours)
    fill(houlsby)
    with torch.no_grad():
        for path, operator in ours.operators.items():
            operator.load_state_dict(houlsby.operators[path].state_dict())
    assert torch.equal(run(model), run(other))


def tiny(model: str, **sizes: Any) -> nn.Module:
    config = getattr(transformers, model.partition("For")[0].removesuffix("Model") + "Config")
    with torch.device("meta"):
        return getattr(transformers, model)(config(num_hidden_layers=2, **sizes))


def torch_stack(norm_first: bool, last: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8) if last else None, enable_nested_tensor=False)


JUDGED = {
    "bert": (lambda: tiny("BertForMaskedLM"), "bert.encoder.layer.0.output.LayerNorm"),
    "albert": (
        lambda: tiny("AlbertForMaskedLM"),
        "albert.encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm",
    ),
    "prenorm": (lambda: tiny("RobertaPreLayerNormForMaskedLM"), "roberta_prelayernorm.encoder.layer.0"),
    "opt": (lambda: tiny("OPTForCausalLM"), "model.decoder.layers.0"),
    "opt-350m": (lambda: tiny("OPTForCausalLM", do_layer_norm_before=False), "model.decoder.layers.0.final_layer_norm"),
    "olmo": (lambda: tiny("OlmoForCausalLM"), "model.layers.0"),
    "torch-post": (lambda: torch_stack(False, True), "layers.0.norm2"),
    "torch-pre": (lambda: torch_stack(True, False), "layers.0"),
}


@pytest.mark.parametrize("name", JUDGED)
def test_post_norm_or_pre_norm(name: str) -> None:
    """Norms of heads count for nothing, those of attentions are not the last, norms without weights are none."""
    build, first = JUDGED[name]
    injection = peftcore.apply(build(), "pfeiffer_adapter")
    assert injection.grafts[0].holders[1].module_path == first
    post = "norm" in first.rpartition(".")[2].lower()
    assert {operator.placement for operator in injection.operators.values()} == {"post" if post else "pre"}


def test_start_is_normal() -> None:
    model, run = host("llama")
    before = run(model)
    operators = peftcore.apply(model, "pfeiffer_adapter", bottleneck=512).operators.values()
    for part in ("down", "up"):
        weights = torch.cat([getattr(each, part).weight.flatten() for each in operators]).detach()
        assert abs(weights.std().item() / 0.02 - 1) < 0.03 and weights.abs().max() > 3 * 0.02
    assert 0 < (run(model) - before).abs().max() < 0.1 * before.abs().max()


def test_what_has_no_stream_behind_it() -> None:
    with pytest.raises(UnsupportedSite, match="branch"):
        peftcore.apply(host("llama")[0], "pfeiffer_adapter", target="q_proj")
    with pytest.raises(UnsupportedSite, match="does not end with a norm"):
        peftcore.plan(tiny("OlmoForCausalLM"), "pfeiffer_adapter", placement="post")
    with torch.device("meta"):
        grid = pytest.importorskip("timm").create_model("maxvit_rmlp_pico_rw_256", img_size=64)
    with pytest.raises(UnsupportedSite, match="one stream of tokens"):
        peftcore.plan(grid, "pfeiffer_adapter")
