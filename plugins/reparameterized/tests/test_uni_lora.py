"""Uni-LoRA beside peft's and beside its equation, as a projection matrix; how balanced and isometric that is, and that
files hold the vector alone."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, One, adapted, hosted, logical
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D
from two_layers import Two

import peftcore
from peftcore.errors import CheckpointError, ConfigError
from peftcore.testing import against, conformance

OPTIONS: dict[str, Any] = {"rank": 2, "theta_length": 7}


# The default vector is longer than all factors in these hosts; a short one moves little where there are many.
@conformance(
    "uni_lora",
    options={
        "*": {"theta_length": 60},
        "bert": {"theta_length": 300},
        "unet": {"theta_length": 1200},
        "convnet": {"theta_length": 300},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def projection(operator: Any) -> Tensor:
    """P [D, d] of the paper for one site: one entry a row, and columns of length 1."""
    index = torch.cat([operator.index_A.flatten(), operator.index_B.flatten()]).long()
    P = nn.functional.one_hot(index, operator.length).double()
    return P / P.norm(dim=0).clamp(min=1e-30)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    base, x = hosted(kind)
    host, injection, operator = adapted(kind, "uni_lora", **OPTIONS)
    theta = injection.shared["theta"].theta
    theta.data.normal_(0, 0.5)
    copy, weight = theta.detach().clone().requires_grad_(), logical(kind, base)
    P = projection(operator)
    assert difference(P.T @ P, torch.eye(7).double()) <= 1e-12
    A, B = (P @ copy).split([operator.index_A.numel(), operator.index_B.numel()])
    A, B = A.view(*operator.index_A.shape), B.view(operator.index_B.shape)
    effective = weight + (B @ A.flatten(B.dim() - 1)).view(weight.shape)
    name = "layer.stack" if kind == "experts" else "layer.weight"
    expected = functional_call(
        base, {name: effective.T if effective.shape != base.get_parameter(name).shape else effective}, (x,)
    )
    ours = host(x)
    assert difference(ours, base(x)) > 1e-3
    assert difference(ours, expected) <= 1e-10
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    assert difference(theta.grad, copy.grad) <= 1e-10


def test_draw_is_balanced_over_all_sites() -> None:
    host = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    injection = peftcore.apply(host, "uni_lora", target=["0", "1"], **OPTIONS)
    parts = [index.flatten() for each in injection.operators.values() for index in each.buffers()]
    counts = torch.cat(parts).bincount(minlength=7)  # of 2 * (6 + 8 + 8 + 5) = 54 entries
    assert counts.tolist() == sorted(counts.tolist(), key=lambda n: -n) or counts.max() - counts.min() == 1
    assert set(counts.tolist()) == {7, 8} and counts.sum() == 54
    assert torch.equal(injection.shared["theta"].norm, counts.double().rsqrt().float())
    theta = injection.shared["theta"].theta
    assert sum(p.numel() for p in injection.parameters()) == len(theta) == 7
    assert 0 < theta.abs().max() <= 0.02


def two() -> Two:
    """Stored one way and the other."""
    return Two(nn.Linear(12, 7), Conv1D(9, 7))


TARGET = ["first", "second"]


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """One vector, and what peft has drawn."""
    layer: Any = theirs.get_submodule(site.module_path)
    for each in "AB":
        operator.get_buffer(f"index_{each}").copy_(getattr(layer, f"unilora_indices_{each}")[ADAPTER])
        index, norm = operator.get_buffer(f"index_{each}").long(), operator.theta.module.norm
        norm[index] = getattr(layer, f"unilora_scales_{each}")[ADAPTER]
    yield Pair("theta", operator.theta.module.theta, layer.unilora_theta_d[ADAPTER], lambda t: t)


@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "uni_lora")
def test_beside_peft() -> None:
    torch.manual_seed(0)
    config = peft.UniLoraConfig(r=2, theta_d_length=20, target_modules=TARGET)
    options = {"rank": 2, "theta_length": 20, "target": TARGET, "dtype": "float64"}
    both = Both(two().double(), "uni_lora", options, config, pairs)
    for pair in both.pairs:  # the vector comes twice, and is filled once
        pair.ours.data.mul_(5)
        pair.theirs.data.copy_(pair.ours)
    assert sum(p.numel() for p in both.tuner.parameters() if p.requires_grad) == 20
    x = torch.randn(4, 12).double()
    for model in (both.ours, both.tuner):
        model.train()
    both.assert_same(lambda model: model(x))


def test_files_hold_the_vector_and_the_seed(tmp_path: Path) -> None:
    """An adapter that was made under another seed of `apply` comes back the same: its indices are drawn again."""
    base, x = nn.Sequential(nn.Linear(300, 100), nn.Linear(100, 200)), torch.randn(3, 300)
    sizes = []
    for stored in (False, True):
        model = deepcopy(base)
        options = {"theta_length": 500, "projection_seed": 7, "seed": 5, "store_indices": stored}
        injection = peftcore.apply(model, "uni_lora", target="all-linear", **options, overrides={"1": {"rank": 3}})
        injection.shared["theta"].theta.data.normal_()
        injection.save(tmp_path / "adapter")
        sizes.append((tmp_path / "adapter" / "adapter.safetensors").stat().st_size)
        expected, other = model(x), deepcopy(base)
        peftcore.load(other, tmp_path / "adapter")
        assert torch.equal(other(x), expected)
    assert sizes[0] <= 4 * 500 + 1000 and sizes[1] >= 4 * (4 * 400 + 3 * 300)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="theta_length cannot change at single sites"):
        peftcore.apply(two(), "uni_lora", target=TARGET, **OPTIONS, overrides={"first": {"theta_length": 2}})
    host = One(nn.Linear(4, 4))
    injection = peftcore.apply(host, "uni_lora", target="layer", **OPTIONS, store_indices=True)
    injection.operators["layer"].get_buffer("index_A").fill_(7)
    injection.save(tmp_path)
    with pytest.raises(CheckpointError, match="index_A has entries outside of the 7 entries"):
        peftcore.load(One(nn.Linear(4, 4)), tmp_path)
