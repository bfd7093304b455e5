"""LoRand: the conformance kit; numbers of the authors' adapter, with gradients, its
start, what trains and its defaults; and its equation in a ViT in training
mode, written a second time in float64."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dropped_hosts import assert_same, filled, image_model, rewrite
from numbers_of import module_of
from torch import Tensor, nn

import peftcore
from peftcore.testing import against, conformance, frozen, same_defaults, same_start

timm = pytest.importorskip("timm")
NUMBERS = Path(__file__).parent / "numbers" / "lorand.json"
AUTHORS = {"repository": "DongshuoYin/CoLin", "commit": "332da5c"}
AUTHORS["script"] = "MMDetection/mmdet/models/backbones/swin_lorand.py"


@conformance("lorand")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@against("authors", "lorand", **AUTHORS)
def test_numbers_of_the_authors_code() -> None:
    numbers, wave = frozen(NUMBERS), module_of("lorand").wave
    host = nn.Sequential(nn.Linear(12, 12)).double().eval().requires_grad_(False)
    host[0].weight.copy_(torch.eye(12))
    host[0].bias.zero_()
    operator = peftcore.apply(host, "lorand", target="0", dtype="float64").operators["0"]
    theirs = {"A": "Q", "g": "K", "B": "P"}  # and the other way round
    with torch.no_grad():
        for part, mine in (("project1", operator.down), ("project2", operator.up)):
            mine.bias.copy_(3 * wave(mine.bias.shape, f"{part}.bias"))
            for name, factor in theirs.items():
                for i, own in enumerate(getattr(mine, factor)):
                    own.copy_(3 * wave(own.mT.shape, f"{part}.param_dict.{name}{i}").mT)
    x = (4 * wave((1, 3, 12), "x")).requires_grad_()
    y = host(x)
    (y * wave(y.shape, "direction")).sum().backward()
    found = {"y": y.flatten(), "x": x.grad.flatten()}
    for part, mine in (("project1", operator.down), ("project2", operator.up)):
        found[f"{part}.bias"] = mine.bias.grad[:6]
        for name, factor in theirs.items():
            for i, grad in enumerate(getattr(mine, factor).grad):
                found[f"{part}.param_dict.{name}{i}"] = grad.mT.flatten()[:6]
    assert found.keys() == numbers.keys()
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=name)


def adapted(h: Tensor, t: dict[str, Tensor]) -> Tensor:
    down, up = (
        sum(P @ K @ Q for P, K, Q in zip(*(t[f"{part}.{each}"] for each in "PKQ"), strict=True))
        for part in ("down", "up")
    )
    inner = h @ down.T + t["down.bias"]
    return h + (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))) @ up.T + t["up.bias"]


def block(self: nn.Module, x: Tensor, attn: dict[str, Tensor], mlp: dict[str, Tensor]) -> Tensor:
    x = x + adapted(self.drop_path1(self.ls1(self.attn(self.norm1(x)))), attn)
    return x + adapted(self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), mlp)


def test_equation_in_training() -> None:
    model, twin, bare = image_model(), image_model(), image_model()
    injection = peftcore.apply(model, "lorand", rank=3, branches=2, dtype="float64")
    copies = filled(injection)
    for tensors, operator in zip(copies.values(), injection.operators.values(), strict=True):
        for key, parameter in operator.named_parameters():  # products of three
            parameter.data *= 4
            tensors[key].data *= 4
    parts = {f"blocks.{i}": [copies[f"blocks.{i}.{each}"] for each in ("attn.proj", "mlp.fc2")] for i in (0, 1)}
    rewrite(twin, block, parts)
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    assert_same(injection, copies, (model, twin), lambda each: each(x), bare)


def test_zero_up_is_an_exact_identity() -> None:
    x, own = torch.randn(3, 64), nn.Sequential(nn.Linear(64, 64))
    before = own(x)
    peftcore.apply(own, "lorand", target="0", zero_up=True)
    assert torch.equal(own(x), before)


@against("authors", "lorand", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    host = nn.Sequential(nn.Linear(1, 8400))
    (operator,) = peftcore.apply(host, "lorand", target="0", rank=40).operators.values()
    told, ours = frozen(NUMBERS, "start"), dict(operator.named_parameters())
    assert ours.keys() == told.keys()
    for name, tensor in ours.items():
        same_start(tensor, told[name])


@against("authors", "lorand", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Two adapters in a block of 12."""
    sizes = {"img_size": 8, "embed_dim": 12, "depths": (1,), "num_heads": (2,), "window_size": 2}
    swin, found = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **sizes), {}
    for place, operator in zip(("lorand1", "lorand2"), peftcore.apply(swin, "lorand").operators.values(), strict=True):
        found |= {name: each.numel() for name, each in operator.named_parameters(place)}
    assert found == frozen(NUMBERS, "trains")


@against("authors", "lorand", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(nn.Sequential(nn.Linear(12, 12)), "lorand", target="0").config
    same_defaults(config, frozen(NUMBERS, "defaults"))
