"""Mona: the conformance kit; a Swin block of the authors' code, with its gradients, its start, what trains
and its defaults; its equation in a ViT in training mode, written a second time in float64; and where the stream is."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dropped_hosts import assert_same, filled, rewrite
from dropped_hosts import image_model as dropped_model
from numbers_of import module_of
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS

timm = pytest.importorskip("timm")
NUMBERS = Path(__file__).parent / "numbers" / "mona.json"
AUTHORS = {"repository": "Leiyi-Hu/mona", "commit": "5deeac9"}
AUTHORS["script"] = "Swin-Transformer-Classification/mmcls/models/backbones/swin_transformer_mona.py"


@conformance("mona", telling=["vit", "encoder"], options={"encoder": {"grid": (1, 1)}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def swin() -> Any:
    """Returns a Swin of one block."""
    sizes = {"img_size": 16, "embed_dim": 8, "depths": (1,), "num_heads": (2,), "window_size": 2}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **sizes)


@against("authors", "mona", **AUTHORS)
def test_numbers_of_the_authors_code() -> None:
    numbers, wave, model = frozen(NUMBERS), module_of("mona").wave, swin().double().eval()
    injection = peftcore.apply(model, "mona", dtype="float64")
    (operator,), block = injection.operators.values(), model.layers[0].blocks[0]
    with torch.no_grad():
        for name, parameter in [*operator.named_parameters(), *block.named_parameters()]:
            if ".peft." not in name:
                parameter.copy_(wave(parameter.shape, name))
    x = (4 * wave((2, 16, 8), "x")).requires_grad_()
    y = block(x.view(2, 4, 4, 8)).flatten(1, 2)
    (y * wave(y.shape, "direction")).sum().backward()
    found = {"y": y[1, ::5], "x": x.grad[1, ::5]}
    found |= {name: parameter.grad.flatten()[:4] for name, parameter in operator.named_parameters()}
    assert found.keys() == numbers.keys()
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=name)


@against("authors", "mona", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    """The draws of each tensor, with more channels than 64, of the 1 by 1 convolution those of some channels."""
    told = frozen(NUMBERS, "start")
    (operator,) = peftcore.apply(swin(), "mona", bottleneck=5000, behind="attention").operators.values()
    ours = dict(operator.named_parameters())
    assert ours.keys() == told.keys()
    for name, tensor in ours.items():
        same_start(tensor[:20] if name == "attention.mix.weight" else tensor, told[name])


@against("authors", "mona", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    (operator,) = peftcore.apply(swin(), "mona").operators.values()
    assert {name: each.numel() for name, each in operator.named_parameters()} == frozen(NUMBERS, "trains")


@against("authors", "mona", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(swin(), "mona").config, frozen(NUMBERS, "defaults"))


def added(x: Tensor, t: dict[str, Tensor], name: str, prefix: int) -> Tensor:
    """What one adapter adds to [batch, tokens, features], its convolutions as sums over shifted pictures."""
    t = {key.removeprefix(f"{name}."): value for key, value in t.items() if key.startswith(f"{name}.")}
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * t["norm.weight"] + t["norm.bias"]
    u = (normed * t["gamma"] + x * t["delta"]) @ t["down.weight"].T + t["down.bias"]
    side = math.isqrt(x.shape[1] - prefix)
    grid = u[:, prefix:].unflatten(1, (side, side))
    seen, alone = grid, u[:, :prefix]
    for index, k in enumerate((3, 5, 7)):
        weight, bias = t[f"filters.{index}.weight"][:, 0], t[f"filters.{index}.bias"]  # [h, k, k]
        around = nn.functional.pad(grid, (0, 0, *[k // 2] * 4))
        moved = [around[:, i : i + side, j : j + side] * weight[:, i, j] for i in range(k) for j in range(k)]
        seen = seen + (sum(moved) + bias) / 3
        alone = alone + (u[:, :prefix] * weight[:, k // 2, k // 2] + bias) / 3
    c = torch.cat([alone, seen.flatten(1, 2)], 1)
    c = c + c @ t["mix.weight"][:, :, 0, 0].T + t["mix.bias"]
    inner = c * 0.5 * (1 + torch.erf(c / math.sqrt(2)))
    return inner @ t["up.weight"].T + t["up.bias"]


def block(self: nn.Module, x: Tensor, t: dict[str, Tensor], behind: str) -> Tensor:
    x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
    x = x + (added(x, t, "attention", 1) if behind != "feed-forward" else 0)
    x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
    return x + (added(x, t, "feed_forward", 1) if behind != "attention" else 0)


@pytest.mark.parametrize("behind", ["both", "attention", "feed-forward"])
def test_equation_in_training(behind: str) -> None:
    """With dropout, layer scale and stochastic depth of the host, which the adapters are behind."""
    model, twin, bare = dropped_model(), dropped_model(), dropped_model()
    options = {"dropout": 0.0, "bottleneck": 3, "behind": behind, "dtype": "float64"}
    injection = peftcore.apply(model, "mona", **options)
    copies = filled(injection)
    rewrite(twin, block, {path: [tensors, behind] for path, tensors in copies.items()})
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    assert_same(injection, copies, (model, twin), lambda each: each(x), bare)


SIZES: dict[str, Any] = {"img_size": 32, "num_classes": 5}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_stream_of_windows_is_whole(name: str) -> None:
    """A bottleneck at two features of the stream: what it adds is seen by the whole picture, not by a window."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SIZES, **SWIN).double().eval()
    injection = peftcore.apply(model, "mona", bottleneck=2, dtype="float64")
    copies = filled(injection)
    own, x = model.layers[0].blocks[1], torch.randn(1, 8, 8, 16, dtype=torch.float64)
    first = name.startswith("swin_")

    def attended(x: Tensor) -> Tensor:
        return own._attn(own.norm1(x)) if first else own.norm1(own._attn(x))

    def fed(x: Tensor) -> Tensor:
        return own.mlp(own.norm2(x)) if first else own.norm2(own.mlp(x))

    ours, t = own(x), copies["layers.0.blocks.1"]
    with injection.disabled():
        stream = x + attended(x)
        tokens = stream.flatten(1, 2)
        stream = (tokens + added(tokens, t, "attention", 0)).view_as(x)
        stream = (stream + fed(stream)).flatten(1, 2)
        expected = (stream + added(stream, t, "feed_forward", 0)).view_as(x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_dropout_is_in_front_of_the_last_matrix() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, embed_dim=24, depth=1, num_heads=2, **SIZES)
    injection = peftcore.apply(model, "mona", dropout=0.999)
    filled(injection)
    operator = injection.operators["blocks.0"].train()
    x = torch.randn(1, 17, 24)
    added = operator.amid(x)
    assert 0.9 < (added == operator.attention.up.bias).float().mean() < 1 or torch.allclose(
        added, operator.attention.up.bias.expand_as(added)
    )
    assert peftcore.apply(model, "mona", name="other").operators["blocks.0"].attention.dropout.p == 0.1


def test_start_is_the_base_model_where_it_is_asked_for() -> None:
    model, inputs = HOSTS["vit"].build()
    before = model(**inputs).logits
    injection = peftcore.apply(model, "mona")
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)
    adapter = injection.operators["vit.layers.0"].attention
    assert (adapter.gamma == 1e-6).all() and (adapter.delta == 1).all()
    injection.remove()
    peftcore.apply(model, "mona", zero_up=True)
    assert torch.equal(model(**inputs).logits, before)


def test_what_has_no_stream_of_patches_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="no grid"):
        peftcore.plan(HOSTS["bert"].build()[0], "mona")
    with pytest.raises(UnsupportedSite, match="the module that reads the stream after the attention is unknown"):
        peftcore.plan(HOSTS["dit"].build()[0], "mona")
    things = timm.models.vision_transformer.ParallelThingsBlock
    model = timm.create_model("vit_tiny_patch16_224", depth=1, block_fn=things, **SIZES)
    with pytest.raises(UnsupportedSite, match="not an attention followed by a feed-forward"):
        peftcore.plan(model, "mona")
