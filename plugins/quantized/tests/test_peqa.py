"""PEQA beside its equation with codes, scales and zeros; what stays of the codes when it is merged."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from equation_in_float64 import KINDS, assert_equation
from packed_bases import SCHEMES, assert_lives_on, dense, fill
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import conformance


# The kit moves what trains by N(0, 0.1): in the steps of 4 bits these would be gains of ten. Cast to bfloat16, a weight
# has other codes of 4 bits here and there, and the choice of experts carries that on: 8 bits there.
@conformance("peqa", options={"*": {"bits": 2}, "moe": {"bits": 2, "scheme": "int8"}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def in_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales s and codes without their zeros q - z, each [out, groups, ...], of the scheme int4, written a second
    time; s (q - z) in float32 as there."""
    groups = weight.detach().float().reshape(weight.shape[0], -1, group)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    s = (high - low) / 15
    rounded = (((groups - low) / s).round() - (-low / s)) * s
    return s.double(), rounded.double() / s.double()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str, groups: int) -> None:
    """The scales of the codes themselves change, by as much of them as ds is of s0."""
    inputs = {"linear": 12, "wide": 6, "convolution": 24, "grouped": 6, "embedding": 9}.get(kind, 12)

    def changed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        s, steps = in_groups(weight, inputs // groups)
        s0 = (s * steps).abs().amax(2, keepdim=True) / 7
        assert difference(tensors["s0"], s0[:, :, 0]) <= 1e-10
        return ((s + tensors["ds"][:, :, None] * s / s0) * steps).reshape(weight.shape)

    options: dict[str, Any] = {"scheme": "int4", "scheme_options": {"group_size": inputs // groups}}
    assert_equation(kind, "peqa", changed, group_size=None if groups == 1 else inputs // groups, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_packed_bases(scheme: str, tmp_path: Path) -> None:
    assert_lives_on(scheme, "peqa", tmp_path)


@pytest.mark.parametrize(("scheme", "group"), [("int8", None), ("nf4", None), ("nf4", 64), ("int4", None)])
def test_merge_keeps_the_codes(scheme: str, group: int | None) -> None:
    """Where scales come from the largest values of their blocks; and nothing else than the scales changes."""
    model, x = dense()
    injection = peftcore.apply(peftcore.quantize(model, scheme), "peqa", target=["0", "2"], group_size=group)
    fill(injection)
    with torch.no_grad():
        for operator in injection.operators.values():  # scales stay positive: a change by up to a half
            operator.ds.clamp_(-0.5, 0.5).mul_(operator.s0)
    expected, before = model(x), deepcopy(model)
    report = injection.merge(into="same")
    for path in ("0", "2"):
        assert report.repacked[path].error <= 1e-6
        old, new = (dict(each.get_submodule(path)._buffers) for each in (before, model))
        assert torch.equal(old.pop("codes"), new.pop("codes"))
        if scheme == "int4":
            assert difference(new.pop("zero"), old.pop("zero")) <= 1e-5
        ((scale, changed),) = zip(old.values(), new.values(), strict=True)
        ratio = 1 + injection.operators[path].ds / injection.operators[path].s0
        assert difference(changed.view(len(ratio), -1), scale.view(len(ratio), -1) * ratio) <= 1e-6
    assert difference(model(x), expected) <= 1e-6


def test_groups_across_blocks_do_not_keep_them() -> None:
    model = peftcore.quantize(dense()[0], "nf4")
    injection = peftcore.apply(model, "peqa", target="0", group_size=16)
    with torch.no_grad():
        injection.operators["0"].ds.uniform_(-0.5, 0.5).mul_(injection.operators["0"].s0)
    assert injection.merge(into="same").repacked["0"].error > 1e-2


def test_it_starts_at_what_the_base_holds_and_the_unit_is_a_step_of_the_codes() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.7, -1.4, 0.0, 0.35], [0.0, 0.0, 0.0, 0.0]]))
    injection = peftcore.apply(model, "peqa", target="0", scheme="int8")
    (operator,) = injection.operators.values()
    torch.testing.assert_close(operator.s0, torch.tensor([[0.2], [1 / 7]]))
    assert operator.ds.tolist() == [[0.0], [0.0]]
    with torch.no_grad():
        operator.ds.copy_(torch.tensor([[0.1], [0.1]]))  # half a step more; a row of zeros stays one
    torch.testing.assert_close(
        model(torch.eye(4)).T, torch.tensor([[1.05, -2.1, 0.0, 0.525], [0.0] * 4]), rtol=0, atol=0.01
    )


def test_no_weight_decay() -> None:
    """A decay would pull the scales to those of the base, not to zero; the paper has none."""
    model = peftcore.quantize(dense()[0], "int8")
    injection = peftcore.apply(model, "peqa", target=["0", "2"])
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    assert [(len(group["params"]), group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [
        (2, 0.0, 1e-3)
    ]


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="64 inputs are not divisible by group_size=48"):
        peftcore.plan(dense()[0], "peqa", target="0", group_size=48)
    with pytest.raises(UnsupportedSite, match="a vector"):
        peftcore.apply(dense()[0], "peqa", target="0.bias")
