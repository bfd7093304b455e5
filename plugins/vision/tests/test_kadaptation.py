"""KAdaptation: the conformance kit; what the authors' code adds, with gradients, starts from and trains; its
equation in a ViT as Kronecker products, merged too; and dropout of the update's entries."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from numbers_of import module_of
from torch import nn

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start

timm = pytest.importorskip("timm")
NUMBERS = Path(__file__).parent / "numbers" / "kadaptation.json"
AUTHORS = {"repository": "eric-ai-lab/PEViT", "commit": "be6fb43", "script": "vision_benchmark/evaluation/model.py"}


@conformance(
    "kadaptation",
    options={"*": {"products": 2, "scale": 1.0, "rule_range": 1.0}},
    expected_failures={"draws_are_declared-encoder": "queries and values are read there, so nothing drops"},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("which", ["q", "v"])
@against("authors", "kadaptation", **AUTHORS)
def test_numbers_of_the_authors_code(which: str) -> None:
    wave, number = module_of("kadaptation").wave, {"q": 1, "v": 2}[which]
    host = nn.Sequential(nn.Linear(64, 64)).double().eval().requires_grad_(False)
    host[0].weight.zero_()
    host[0].bias.zero_()
    injection = peftcore.apply(host, "kadaptation", target="0", dtype="float64")
    operator = injection.operators["0"]
    tensors = {"q_proj_adapter1_left": operator.u, "q_proj_adapter1_right": operator.v}  # of values too, there
    tensors |= {f"phm_rule{number}_left": operator.rule.module.left, "b": operator.bias.module.weight}
    tensors |= {f"phm_rule{number}_right": operator.rule.module.right}
    with torch.no_grad():
        for name, parameter in tensors.items():
            parameter.copy_(wave(parameter.shape, name))
    x = wave((2, 64), "x").requires_grad_()
    added = host(x)
    (added * wave(added.shape, "direction")).sum().backward()
    found = {"added": added[:, :8], "x": x.grad[:, :8]}
    found |= {name: p.grad.flatten()[:6] for name, p in tensors.items() if name != "b"}
    numbers = frozen(NUMBERS)[which]
    assert found.keys() == numbers.keys()
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value.flatten(), expected, rtol=1e-9, atol=1e-11, msg=name)


@against("authors", "kadaptation", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    """But for u: theirs is zero as v is, so that neither, nor a rule, ever has a gradient; ours is the Glorot draw that
    they name, and do not run for factors."""
    told, wide = frozen(NUMBERS, "start"), nn.Sequential(nn.Linear(40_000, 2))
    assert told["named"] == "glorot-uniform" and told["u"] == told["gradients"] == {"all": 0.0}
    same_start(peftcore.apply(wide, "kadaptation", target="0", products=2).operators["0"].u, told["glorot"])
    host = nn.Sequential(nn.Linear(64, 64))
    (operator,) = peftcore.apply(host, "kadaptation", target="0", products=64).operators.values()
    same_start(torch.stack([*operator.rule.module.parameters()]), told["rule"])
    same_start(operator.v, told["v"])
    same_start(operator.bias.module.weight, told["bias"])


def one_block() -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


@against("authors", "kadaptation", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """With the head, which `train` names here; b is one for queries and values."""
    injection = peftcore.apply(one_block(), "kadaptation", train=["head"])
    found: dict[str, int] = {"b": injection.shared["bias_blocks_0_attn_64"].weight.numel()}
    for role in "qv":
        operator = injection.operators[f"blocks.0.attn.qkv:attn.{role}"]
        tensors = [*operator.named_parameters(role), *operator.rule.module.named_parameters(f"{role}.rule")]
        found |= {name: each.numel() for name, each in tensors}
    found |= {f"head.{name}": each.numel() for name, each in injection.model.head.named_parameters()}
    assert found == frozen(NUMBERS, "trains")
    assert sum(each.numel() for each in injection.parameters()) == sum(found.values())


@against("authors", "kadaptation", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(one_block(), "kadaptation").config
    why = "None stands for theirs, and for 0 where a weight is read and nothing can drop"
    same_defaults(config, frozen(NUMBERS, "defaults"), otherwise={"dropout": why})


def test_equation_in_a_vit() -> None:
    """Kronecker products of queries and values, whose shared matrices all layers have in common."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    base = timm.create_model("vit_tiny_patch16_224", **sizes).double().eval().requires_grad_(False)
    model, x = deepcopy(base), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    options = {"products": 4, "rank": 2, "scale": 50.0, "dtype": "float64"}
    injection = peftcore.apply(model, "kadaptation", **options)
    assert torch.equal(model(x), base(x))
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.1)
    before = base(x)
    for path, operator in injection.operators.items():
        module, _, role = path.partition(":")
        rows = slice(0, 24) if role == "attn.q" else slice(48, 72)
        rule, qkv = injection.shared[f"rule_{role.replace('.', '_')}"], base.get_submodule(module)
        products = (
            torch.kron(torch.outer(l, r), u @ v)
            for l, r, u, v in zip(rule.left, rule.right, operator.u, operator.v, strict=True)  # noqa: E741
        )
        qkv.weight.data[rows] += 50 * sum(products).T
        block = module.removesuffix(".qkv").replace(".", "_")
        qkv.bias.data[rows] += injection.shared[f"bias_{block}_24"].weight
    assert len(injection.shared) == 4
    expected = base(x)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    injection.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_entries_of_the_update_drop_in_training() -> None:
    host = nn.Sequential(nn.Linear(64, 32)).double().requires_grad_(False)
    injection = peftcore.apply(host, "kadaptation", target="0", dtype="float64")
    operator = injection.operators["0"]
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.1)
    x = torch.randn(3, 64, dtype=torch.float64)
    torch.manual_seed(1)
    ours = host.train()(x)
    torch.manual_seed(1)
    update = nn.functional.dropout(operator.dense(), 0.5)
    expected = x @ (host[0].weight + 160 * update).T + host[0].bias + operator.bias.module.weight
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_start_learns() -> None:
    """Unlike the authors' start, with u and v at zero, which has a gradient of b alone."""
    host = nn.Sequential(nn.Linear(64, 64))
    injection = peftcore.apply(host, "kadaptation", target="0")
    host(torch.randn(4, 64)).square().sum().backward()
    operator = injection.operators["0"]
    assert operator.v.grad.abs().max() > 0


def test_what_it_does_not_divide_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="does not divide"):
        peftcore.plan(nn.Sequential(nn.Linear(48, 64)), "kadaptation", target="0")
    with pytest.raises(ConfigError, match="products cannot change at single sites"):
        peftcore.plan(nn.Sequential(nn.Linear(64, 64)), "kadaptation", target="0", overrides={"0": {"products": 2}})
