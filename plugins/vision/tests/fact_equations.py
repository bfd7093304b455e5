"""Image transformers, and what the tests of FacT's two decompositions have in common: numbers of the authors' code, and
an equation written a second time slice by slice, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing.hosts import HOSTS

timm = pytest.importorskip("timm")

PATHS = {"q": "attn.qkv:attn.q", "k": "attn.qkv:attn.k", "v": "attn.qkv:attn.v"}
PATHS |= {"out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
# A host and its options; the width of its slices, and how many it has.
HOSTED: dict[str, tuple[dict[str, Any], int, int]] = {
    "vit_tiny_patch16_224": (VIT, 24, 2 * 12),
    "swin_tiny_patch4_window7_224": (SWIN, 16, 2 * 12 + 2 * 4 * 12),
    "vit": ({}, 8, 2 * (4 * 4 + 2 * 6)),  # of transformers: widths of 16 and 24
}


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


def image_model(name: str, **changes: Any) -> tuple[nn.Module, Callable[..., Tensor]]:
    torch.manual_seed(0)
    if name in HOSTS:
        model, inputs = HOSTS[name].build()
    else:
        model = timm.create_model(name, num_classes=5, **{**HOSTED[name][0], **changes})
        inputs = {"x": torch.randn(2, 3, 32, 32)}
        for parameter in model.parameters():  # away from the zeros and the tiny scales at which some start
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    inputs = {key: value.double() for key, value in inputs.items()}
    output = HOSTS[name].output if name in HOSTS else lambda y: y
    model = model.double().eval().requires_grad_(False)
    return model, lambda each, tensors=None: output(functional_call(each, tensors or {}, (), inputs))


def wide_model(depth: int) -> nn.Module:
    """A transformer 768 wide, as the authors' code has it."""
    sizes = {"img_size": 16, "patch_size": 16, "embed_dim": 768, "depth": depth, "num_heads": 2, "num_classes": 5}
    model: nn.Module = timm.models.vision_transformer.VisionTransformer(**sizes)
    return model


def apply(model: nn.Module, method: str, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, method, dtype="float64", **{"rank": 3, "scale": 0.7, **options})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def in_places(weight: Tensor, U: Tensor, V: Tensor, middle: Callable[[int, int], Tensor]) -> Tensor:
    """0.7 V Sigma U in each place of a matrix; `middle` gives all Sigma of so many rows and columns of slices."""
    rows, columns, rank = weight.shape[0] // len(V), weight.shape[1] // len(V), len(U)
    sigma = middle(rows, columns).reshape(rows, rank, columns, rank)
    return torch.cat([torch.cat([0.7 * V @ sigma[i, :, j] @ U for j in range(columns)], 1) for i in range(rows)])


def small_operators(method: str) -> dict[str, Any]:
    """The operators of a host of one block, at the scale of the authors' numbers; U and V are waves."""
    model, _ = image_model("vit_tiny_patch16_224", embed_dim=6, depth=1, num_heads=1)
    injection = apply(model, method, scale=50.0)
    operators = {name: injection.operators[f"blocks.0.{path}"] for name, path in PATHS.items()}
    with torch.no_grad():
        for operator in operators.values():
            operator.U.module.weight.copy_(wave(3, 6, step=1.1))
            operator.V.module.weight.copy_(wave(6, 3, step=1.3))
    return operators


def assert_authors(operators: Mapping[str, Any], numbers: Mapping[str, list[float]]) -> None:
    """What is added to queries, keys and values of a token, to the output of an attention that reads those values, and
    by both matrices of the feed-forward."""
    added = {}
    for name, operator in operators.items():
        token = added["v"] if name == "out" else 5 * wave(24 if name == "down" else 6, step=2.1)
        zeros = torch.zeros(len(numbers[name]), len(token), dtype=torch.float64)
        added[name] = operator.merged(zeros) @ token
        torch.testing.assert_close(
            added[name], torch.tensor(numbers[name], dtype=torch.float64), rtol=1e-10, atol=1e-12
        )


def assert_equation(
    method: str, name: str, shared: tuple[str, ...], own: str, update: Callable[..., Tensor], parameters: int
) -> None:
    """Outputs, gradients of shared and of own tensors, merged weights, and how many numbers train."""
    base, run = image_model(name)
    model = deepcopy(base)
    injection = apply(model, method)
    assert sum(p.numel() for p in injection.parameters()) == parameters
    first, *_ = operators = list(injection.operators.values())
    ours = [*(getattr(first, each).module.weight for each in shared), *(each.get_parameter(own) for each in operators)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    weights: dict[str, Tensor] = {}
    for path, tensor in zip(injection.operators, theirs[len(shared) :], strict=True):
        module, _, part = path.partition(":attn.")
        weight = base.get_submodule(module).weight
        if part:  # a third of the rows
            third = "qkv".index(part)
            whole = list(weights.get(f"{module}.weight", weight).chunk(3))
            whole[third] = whole[third] + update(whole[third], *theirs[: len(shared)], tensor)
            weights[f"{module}.weight"] = torch.cat(whole)
        else:
            weights[f"{module}.weight"] = weight + update(weight, *theirs[: len(shared)], tensor)
    unchanged, expected = run(base), run(base, weights)
    assert (expected - unchanged).abs().max() > 1e-3 * unchanged.abs().max()
    output = run(model)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for each in (output, expected):
        each.square().sum().backward()
    for p, copy in zip(ours, theirs, strict=True):
        assert copy.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, copy.grad, rtol=1e-8, atol=1e-10)
    injection.merge()
    for path, weight in weights.items():
        torch.testing.assert_close(model.get_parameter(path).data, weight.data, rtol=1e-12, atol=1e-12)


def assert_refuses_what_has_no_slices(method: str) -> None:
    host = nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 10))
    with pytest.raises(UnsupportedSite, match=r"divisor 2 .* such as 1"):
        peftcore.plan(host, method, target=["0", "1"], rank=3)
    with pytest.raises(ConfigError, match="rank"):
        peftcore.apply(host, method, target="0", rank=3, overrides={"0": {"rank": 2}})


def assert_authors_dropout(method: str) -> None:
    """By default 0.1 where a module is called, and none at a weight that is read, where one that is asked for is
    refused."""
    (called,) = peftcore.apply(nn.Sequential(nn.Linear(16, 16)), method, target="0").operators.values()
    assert called.dropout.p == 0.1
    attention, target = nn.TransformerEncoderLayer(16, 2, 16), "self_attn.in_proj_weight"
    (read,) = peftcore.apply(attention, method, target=target).operators.values()
    assert read.dropout.p == 0
    with pytest.raises(UnsupportedSite, match="dropout=0"):
        peftcore.apply(attention, method, target=target, name="other", dropout=0.1)
