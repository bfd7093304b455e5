"""RandLoRA beside peft's and beside its equation; its bases, their scale, and the rank of what they make."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation, fill, logical
from peft_pairs import ADAPTER, Both, Pair
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

import peftcore
from peftcore.testing import against, conformance

RANK, ALPHA = 3, 5.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


# Several bases, also in hosts that are narrower than the default rank, and numbers that half precision can hold.
@conformance("randlora", options={"*": {"rank": 3, "alpha": 3.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def assert_sum_of_bases(kind: str, scale: float, **options: Any) -> None:
    basis = adapted(kind, "randlora", **OPTIONS, **options)[2].basis.module

    def summed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        matrix, L, G = weight.flatten(1), tensors["L"], tensors["G"]
        short, long, update = min(matrix.shape), max(matrix.shape), 0
        for j in range(len(G)):
            B = torch.stack([basis.B[:long, : len(G)].reshape(long, -1)[:, k * len(G) + j] for k in range(RANK)], 1)
            update = update + B @ torch.diag(L[:, j]) @ basis.A[:, :short] @ torch.diag(G[j])
        assert len(G) == math.ceil(short / RANK)
        return weight + scale * (update if len(matrix) == long else update.T).reshape(weight.shape)

    assert_equation(kind, "randlora", summed, **OPTIONS, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    assert_sum_of_bases(kind, ALPHA / RANK)


def test_scale_by_the_number_of_bases() -> None:
    """The authors' first code; of 7 rows, 3 bases."""
    assert_sum_of_bases("linear", ALPHA / RANK / math.sqrt(3), scaling="bases")


def test_start() -> None:
    """Nothing, but gradients in L from the first step."""
    operator = adapted("linear", "randlora", **OPTIONS)[2]
    assert not operator.L.any()
    assert (operator.G - 1 / 7).abs().max() <= 1e-6
    weight = logical("linear", adapted("linear", "randlora", **OPTIONS)[0])
    operator(weight).sum().backward()
    assert operator.L.grad.abs().min() > 0


@pytest.mark.parametrize(("basis", "filled"), [("uniform", 1.0), ("sparse", 1 / 3), ("very_sparse", 1 / 10)])
def test_bases(basis: str, filled: float) -> None:
    """Of mean 0 and variance 1, and independent: the update has every direction in which A is not zero altogether."""
    host = nn.Sequential(nn.Linear(100, 200)).double()
    injection = peftcore.apply(host, "randlora", target="0", rank=20, alpha=1.0, basis=basis, dtype="float64")
    (shared,) = injection.shared.values()
    assert shared.A.shape == (20, 100)
    assert shared.B.shape == (200, 5, 20)
    for matrix in (shared.A, shared.B):
        assert abs(matrix.mean()) < 0.1
        assert abs(matrix.square().mean() - 1) < 1e-6
        assert abs((matrix != 0).double().mean() - filled) < 0.03
        assert len(matrix.unique()) == 3 or basis == "uniform"
    before = host[0].weight.detach().clone()
    fill(injection.operators["0"])
    injection.merge()
    assert torch.linalg.matrix_rank(host[0].weight - before) == (shared.A != 0).any(0).sum() > 80


def two() -> Two:
    """More inputs than outputs, and fewer; stored one way and the other."""
    return Two(nn.Linear(12, 7), Conv1D(9, 7))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    layer.randlora_A[ADAPTER] = operator.basis.module.A.unsqueeze(1)
    layer.randlora_B[ADAPTER] = operator.basis.module.B
    yield Pair(f"{site.path}.L", operator.L, layer.randlora_lambda[ADAPTER], lambda t: t)
    yield Pair(f"{site.path}.G", operator.G, layer.randlora_gamma[ADAPTER], lambda t: t)


@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "randlora")
def test_beside_peft() -> None:
    """With our matrices, since peft draws its own in half precision; what pairs with what is the same."""
    torch.manual_seed(0)
    config = peft.RandLoraConfig(r=RANK, randlora_alpha=5, target_modules=["first", "second"])
    both = Both(two(), "randlora", {"target": ["first", "second"], **OPTIONS}, config, pairs)
    x = torch.randn(4, 12)
    both.assert_same(lambda model: model(x))


def test_files_hold_what_trains_and_the_seed(tmp_path: Path) -> None:
    """An adapter that was made under another seed of `apply` comes back the same: its matrices are drawn again."""
    base, x = nn.Sequential(nn.Linear(300, 100), nn.Linear(100, 200)), torch.randn(3, 300)
    model = deepcopy(base)
    options = {"rank": 10, "alpha": 1.0, "projection_seed": 7, "basis": "sparse"}
    injection = peftcore.apply(model, "randlora", target="all-linear", seed=5, **options)
    for operator in injection.operators.values():
        fill(operator)
    injection.save(tmp_path / "adapter")
    trained = sum(p.numel() * p.element_size() for p in injection.parameters())
    assert trained == 4 * 2 * 10 * (10 + 100)
    assert (tmp_path / "adapter" / "adapter.safetensors").stat().st_size <= 1.1 * trained
    expected = model(x)
    peftcore.load(base, tmp_path / "adapter")
    assert torch.equal(base(x), expected)


def test_sites_share_one_pair_unless_their_options_differ() -> None:
    host = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3))
    overrides = {"1": {"projection_seed": 1}, "2": {"rank": 2, "basis": "sparse"}}
    injection = peftcore.apply(host, "randlora", target="all-linear", **OPTIONS, overrides=overrides)
    shapes = {name: (tuple(basis.A.shape), tuple(basis.B.shape)) for name, basis in injection.shared.items()}
    pair = ((3, 6), (8, 2, 3))
    assert shapes == {"uniform_0_3": pair, "uniform_1_3": pair, "sparse_0_2": ((2, 6), (8, 3, 2))}
    first, second = (injection.shared[f"uniform_{seed}_3"].A for seed in (0, 1))
    assert not torch.isclose(first, second).any()
