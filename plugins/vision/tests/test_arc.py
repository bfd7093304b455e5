"""ARC: the conformance kit; two layers of the authors' code, with gradients; its equation as weights, in training too;
and who shares what."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from numbers_of import module_of
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start

timm = pytest.importorskip("timm")
NUMBERS = Path(__file__).parent / "numbers" / "arc.json"
CODE: Any = {"repository": "DavidYanAnDe/ARC", "commit": "8227d57", "script": "Model/ARC_ViT.py"}
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 3}
SHARED = "queries, keys and values share one adapter, which has the path of the first of them that is targeted"
SEPARATE = ("llama", "bert", "t5", "moe", "mistral", "vit", "unet", "dit")


FAILURES = {f"the_start_depends_on_seed_and_path-{host}": SHARED for host in SEPARATE}
FAILURES["a_denied_identity_is_none-mlp"] = "none of its matrices is of a feed-forward, of which alone r is not zero"


@conformance("arc", expected_failures=FAILURES)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def vit(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**VIT, **sizes})
    return model.double().eval().requires_grad_(False)


def filled(model: nn.Module, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, "arc", bottleneck=3, dtype="float64", **options)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.1)
    return injection


@against("authors", "arc", **CODE)
def test_numbers_of_the_authors_code() -> None:
    numbers, wave, model = frozen(NUMBERS), module_of("arc").wave, vit()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks.", "norm.")):
                parameter.copy_(wave(parameter.shape, name))
    injection = peftcore.apply(model, "arc", bottleneck=3, dtype="float64")
    shared = {name: injection.shared[f"{ours}_8"].weight for name, ours in (("att", "attn"), ("mlp", "mlp"))}
    tensors = {f"{name}_down_projection": weight for name, weight in shared.items()}
    for i in range(2):
        for end, part in (("attn.qkv", "att"), ("mlp.fc1", "mlp")):
            operator = injection.operators[f"blocks.{i}.{end}"]
            tensors[f"layer.{i}.{part}_adapter.adapter_rescale"] = operator.rescale
            tensors[f"layer.{i}.{part}_adapter.adapter_bias"] = operator.bias
    with torch.no_grad():
        for name, parameter in tensors.items():
            key = module_of("arc").renamed(name)
            flat = name.endswith("projection")  # the authors' is [d, h]
            parameter.copy_(wave(parameter.mT.shape, key).mT if flat else wave(parameter.shape, key))
    x = (4 * wave((2, 5, 8), "x")).requires_grad_()
    y = model.norm(model.blocks(x))
    (y * wave(y.shape, "direction")).sum().backward()
    found = {"y": y[1], "x": x.grad[1]}
    found |= {name: p.grad.mT.flatten() if "projection" in name else p.grad for name, p in tensors.items()}
    assert found.keys() == numbers.keys()
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=name)


def test_equation_as_weights_and_merged() -> None:
    """The same model with (I + D diag(r) D^T) in its weights; nothing drops where weights are merged."""
    base = vit()
    model, x = deepcopy(base), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, injection = base(x), filled(model, dropout=0.0)
    for path, operator in injection.operators.items():
        D = injection.shared["attn_8" if "attn" in path else "mlp_8"].weight.T
        layer = base.get_submodule(path)
        layer.bias.data += layer.weight @ operator.bias
        layer.weight.data = layer.weight @ (torch.eye(8) + D @ operator.rescale.diag() @ D.T)
    expected = base(x)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-10, atol=1e-10)
    injection.merge()
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-10, atol=1e-10)


def test_dropout_is_in_the_bottleneck() -> None:
    layer = nn.Sequential(nn.Linear(6, 5)).double().requires_grad_(False)
    assert peftcore.apply(layer, "arc", target="0", name="other").operators["0"].dropout.p == 0.1
    peftcore.injections(layer)["other"].remove()
    injection = filled(layer, target="0", dropout=0.5)
    (shared,), operator = injection.shared.values(), injection.operators["0"]
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(1)
    ours = layer.train()(x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones(4, 3, dtype=torch.float64), 0.5)
    read = x + (x @ shared.weight.T * operator.rescale * kept) @ shared.weight + operator.bias
    torch.testing.assert_close(ours, read @ layer[0].weight.T + layer[0].bias, rtol=1e-12, atol=1e-12)


def test_stages_of_other_widths_have_projections_of_their_own() -> None:
    sizes = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **sizes)
    shared = peftcore.apply(model, "arc").shared
    assert {name: tuple(each.weight.shape) for name, each in shared.items()} == {
        f"{part}_{width}": (50, width) for part in ("attn", "mlp") for width in (16, 32)
    }


@against("authors", "arc", **CODE, part="start")
def test_start() -> None:
    injection = peftcore.apply(vit(embed_dim=2, num_heads=1, depth=1), "arc", bottleneck=40_000)
    found = {}
    for part, path in (("attn", "blocks.0.attn.qkv"), ("mlp", "blocks.0.mlp.fc1")):
        operator = injection.operators[path]
        found |= {f"{part}.projection": injection.shared[f"{part}_2"].weight}
        found |= {f"{part}.rescale": operator.rescale, f"{part}.bias": operator.bias}
    told = frozen(NUMBERS, "start")
    assert found.keys() == told.keys()
    for name, each in found.items():
        same_start(each, told[name])


@against("authors", "arc", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Projections, adapters, and the head, which `train` names here."""
    injection = peftcore.apply(vit(), "arc", bottleneck=3, train=["head"])
    names = {"attn.qkv": "att_adapter", "mlp.fc1": "mlp_adapter", "blocks": "transformer.layer"}
    names |= {"rescale": "adapter_rescale", ".bias": ".adapter_bias"}
    *adapters, weight, bias = injection.operators.items()
    ours = {"head_mlp.head.weight": weight[1].value.numel(), "head_mlp.head.bias": bias[1].value.numel()}
    for part, theirs in (("attn", "att"), ("mlp", "mlp")):
        ours[f"transformer.{theirs}_down_projection"] = injection.shared[f"{part}_8"].weight.numel()
    for path, operator in adapters:
        for name, parameter in operator.named_parameters():
            whole = f"{path}.{name}"
            for mine, theirs in names.items():
                whole = whole.replace(mine, theirs)
            if parameter.requires_grad:
                ours[whole] = parameter.numel()
    assert ours == frozen(NUMBERS, "trains")


@against("authors", "arc", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(vit(), "arc")
    assert {each.dropout.p for each in injection.operators.values()} == {frozen(NUMBERS, "defaults")["dropout"]}
    reason = "None is theirs where a matrix is called, and 0 where its weight is read, which no dropout can reach"
    same_defaults(injection.config, frozen(NUMBERS, "defaults"), otherwise={"dropout": reason})


def test_the_start_is_no_identity_unless_told() -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    injection = peftcore.apply(model, "arc", dtype="float64")
    starts: dict[str, Tensor] = {path: each.rescale for path, each in injection.operators.items()}
    assert all(bool(start.any()) == ("mlp" in path) for path, start in starts.items())
    assert max(start.abs().max() for start in starts.values()) <= (6 / 51) ** 0.5
    assert not torch.allclose(model(x), before)
    injection.remove()
    peftcore.apply(model, "arc", dtype="float64", feed_forward_start="zero")
    assert torch.equal(model(x), before)


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="pads"):
        peftcore.plan(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), "arc", target="0")
    with pytest.raises(ConfigError, match="bottleneck cannot change at single sites"):
        peftcore.plan(vit(), "arc", overrides={"blocks.0.mlp.fc1": {"bottleneck": 4}})


def test_numbers_in_a_vit() -> None:
    """Two D of 768 x 50, and 24 adapters of 50 + 768: with heads of 48 classes the 0.13 million of the paper."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert peftcore.plan(model, "arc").trainable == 2 * 768 * 50 + 24 * (50 + 768) == 96_432
