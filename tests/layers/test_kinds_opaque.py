"""Weights that nobody can read: what is called can be adapted beside them, and all that needs them is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftcore
from peftcore.errors import MergeError, UnsupportedSite
from peftcore.testing.kit import fill
from peftcore.testing.tools import KINDS, Kinds, differences, trace


class Coded(Tensor):
    """A subclass that makes its numbers when it is used."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Coded:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [each.inner.float() / 8 if isinstance(each, Coded) else each for each in args]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.t.default):
            return Coded(func(args[0].inner))
        return func(*plain, **(kwargs or {}))


class Integers(nn.Module):
    """Integers and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.out_features, self.in_features = 5, 6
        self.weight = nn.Parameter(torch.randint(-8, 8, (5, 6), dtype=torch.int8), requires_grad=False)
        self.scale, self.bias = nn.Parameter(torch.tensor([0.1])), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Bytes(nn.Linear):
    """Bytes of floating point, and a scale for all."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * 2, self.bias)


def _coded() -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.weight = nn.Parameter(Coded(torch.randint(-8, 8, (5, 6), dtype=torch.int8)), requires_grad=False)
    return layer


def _bytes() -> nn.Module:
    layer = Bytes(6, 5)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (_coded, "Coded of float32"),
    "integers": (Integers, "Parameter of int8"),
    "bytes": (_bytes, "Parameter of float8_e4m3fn"),
}


@pytest.fixture(params=LAYERS)
def host(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), LAYERS[request.param][0]()).eval()


@pytest.fixture
def stored(request: pytest.FixtureRequest, host: nn.Module) -> str:
    """How the error calls the weight."""
    return LAYERS[request.node.callspec.params["host"]][1]


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit"])
def test_what_acts_beside_it_trains(host: nn.Module, method: str) -> None:
    before, base = trace(host), host(X).detach()
    injection = peftcore.apply(host, method, target=["1"])
    fill(injection)
    output = host(X)
    assert (output - base).abs().max() > 0.01
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in injection.parameters())
    injection.remove()
    assert not differences(before, trace(host))
    assert torch.equal(host(X), base)


@pytest.mark.parametrize("into", ["float", "same"])
@pytest.mark.parametrize("kind", ["activation", "gain"])
def test_a_merge_is_refused_and_nothing_changes(host: nn.Module, stored: str, kind: str, into: Any) -> None:
    injection = peftcore.apply(host, Kinds, kind=kind, target=["0", "1"])
    fill(injection)
    output, before = host(X), trace(host)
    with pytest.raises(MergeError, match=f"^1 cannot be merged, keep 'partner_kinds' active: .*{stored}"):
        injection.merge(into=into)
    assert not injection.merged
    assert not differences(before, trace(host))
    assert torch.equal(host(X), output)


def test_a_bias_beside_it_merges(host: nn.Module) -> None:
    injection = peftcore.apply(host, Kinds, kind="bias", target=["1"])
    fill(injection)
    output, before = host(X), trace(host)
    injection.merge()
    assert differences(before, trace(host))
    torch.testing.assert_close(host(X), output)
    injection.unmerge()
    assert not differences(before, trace(host))


@pytest.mark.parametrize("act", [peftcore.apply, peftcore.plan])
@pytest.mark.parametrize("method", ["dora", "pissa", "qlora", "oft"])
def test_what_needs_the_weight_is_refused(host: nn.Module, stored: str, method: str, act: Callable[..., Any]) -> None:
    before = trace(host)
    options = {"block_size": 2} if method == "oft" else {}
    with pytest.raises(UnsupportedSite, match=f"stored as {stored}, which no installed plugin can read.* such as lora"):
        act(host, method, target=["0", "1"], **options)
    assert not differences(before, trace(host))
    assert not peftcore.injections(host)


def test_it_is_not_packed(host: nn.Module, stored: str) -> None:
    before = trace(host)
    with pytest.raises(UnsupportedSite, match=stored):
        peftcore.quantize(host, "nf4")
    assert not differences(before, trace(host))


def test_all_kinds_are_looked_at() -> None:
    assert set(KINDS) == {"activation", "gain", "bias", "weight"}
    with pytest.raises(UnsupportedSite, match="Parameter of int8"):
        peftcore.apply(nn.Sequential(Integers()), Kinds, kind="weight", target=["0"])
