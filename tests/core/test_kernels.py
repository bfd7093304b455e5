"""The kernels beside the plain mathematics that they stand for."""

import math
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from peftcore import kernels
from peftcore.kernels import rotations, skew

SHAPES = [(6, 3, 2), (5, 1, 4), (1, 3, 2)]
"""Rows, blocks, size."""


def blocks(rows: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, count * size, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(count, size, size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_is_a_product_with_a_block_diagonal_matrix(shape: tuple[int, int, int]) -> None:
    x, R = blocks(*shape)
    expected, before = x @ torch.block_diag(*R), x.clone()
    torch.testing.assert_close(kernels.rotate(x, R), expected)
    torch.testing.assert_close(kernels.plain_rotate(x, R), expected)
    with torch.no_grad():
        torch.testing.assert_close(rotations._where_they_lie(x, R).view(x.shape), expected)  # of other devices
    torch.testing.assert_close(x, before, atol=0, rtol=0)


def test_rotation_of_rows_in_several_dimensions_that_lie_anyhow() -> None:
    _, R = blocks(6, 3, 2)
    apart = torch.randn(2, 6, 3, dtype=torch.float64).mT.requires_grad_()  # [2, 3, 6], not contiguous
    torch.testing.assert_close(kernels.rotate(apart, R), apart @ torch.block_diag(*R))
    assert gradcheck(kernels.rotate, (apart, R)) and gradgradcheck(kernels.rotate, (apart, R))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_rotation(shape: tuple[int, int, int]) -> None:
    assert gradcheck(kernels.rotate, blocks(*shape))
    assert gradgradcheck(kernels.rotate, blocks(*shape))
    x, R = blocks(*shape)
    assert gradcheck(kernels.rotate, (x.detach(), R)) and gradcheck(kernels.rotate, (x, R.detach()))


def test_what_goes_into_a_rotation_and_back_stays() -> None:
    given = [*blocks(6, 3, 2), torch.randn(6, 6, dtype=torch.float64)]
    x, R, gradient = given
    before = [each.detach().clone() for each in given]
    torch.autograd.grad(kernels.rotate(x, R), (x, R), gradient)
    assert all(map(torch.equal, given, before))


def test_rotation_under_vmap_and_grad() -> None:
    x, R = (each.detach() for each in blocks(6, 3, 2))

    def norm(R: Tensor, row: Tensor) -> Tensor:
        return kernels.rotate(row.unsqueeze(0), R).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(norm), in_dims=(None, 0))(R, x)
    whole = torch.func.grad(lambda R: kernels.rotate(x, R).pow(2).sum())(R)
    torch.testing.assert_close(each.sum(0), whole)


Turned = tuple[Tensor, Tensor, Tensor, Tensor]


def layer_and_rotation(*leading: int, count: int = 3, exact: bool = True) -> Turned:
    """x, weight, bias and blocks of two, of rotations if exact; the first and the last want gradients."""
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((*leading, 6), (4, 6), (4,)))
    R = torch.randn(count, 2, 2, dtype=torch.float64)
    R = kernels.plain_cayley(R[:, :1, 1], 2) if exact else R
    return x.requires_grad_(), weight, bias, R.requires_grad_()


LEADING = pytest.mark.parametrize(("leading", "count"), [((9,), 3), ((2, 4), 3), ((5,), 3), ((), 3), ((9,), 1)])
"""As many rows as turn the weight there and back, or there alone, or nothing but themselves."""
EXACT = pytest.mark.parametrize("exact", [True, False])


@EXACT
@pytest.mark.parametrize("biased", [True, False])
@LEADING
def test_a_linear_layer_of_turned_inputs(leading: tuple[int, ...], count: int, biased: bool, exact: bool) -> None:
    x, weight, bias, R = layer_and_rotation(*leading, count=count, exact=exact)
    kept = [each.detach().clone() for each in (x, weight)]
    found = kernels.rotated_linear(x, weight, bias if biased else None, R, exact)
    expected = x @ torch.block_diag(*R.expand(3, 2, 2)) @ weight.T + (bias if biased else 0.0)
    torch.testing.assert_close(found, expected)
    plain = kernels.plain_rotated_linear(x, weight, bias if biased else None, R)
    torch.testing.assert_close(plain, expected)
    gradient = torch.randn_like(found)
    given = gradient.clone()
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, R), gradient), torch.autograd.grad(plain, (x, R), gradient)
    )
    assert torch.equal(gradient, given) and all(map(torch.equal, (x, weight), kept))


@EXACT
@LEADING
def test_gradients_of_a_linear_layer_of_turned_inputs(leading: tuple[int, ...], count: int, exact: bool) -> None:
    x, weight, bias, R = layer_and_rotation(*leading, count=count, exact=exact)

    def run(x: Tensor, R: Tensor) -> Tensor:
        return kernels.rotated_linear(x, weight, bias, R, exact)

    for given in ((x, R), (x.detach(), R), (x, R.detach())):
        assert gradcheck(run, given) and gradgradcheck(run, given)


def test_gradients_of_gradients_of_turned_inputs_hold_beside_rotations_too() -> None:
    x, weight, bias, R = layer_and_rotation(9)
    found = []
    for kernel in (kernels.rotated_linear, kernels.plain_rotated_linear):
        first = torch.autograd.grad(kernel(x, weight, bias, R).square().sum(), (x, R), create_graph=True)
        found.append(torch.autograd.grad(sum(each.sin().sum() for each in first), (x, R)))
    torch.testing.assert_close(*found)


def test_a_linear_layer_of_turned_inputs_under_vmap_and_grad() -> None:
    x, weight, bias, R = (each.detach() for each in layer_and_rotation(7))

    def norm(R: Tensor, x: Tensor) -> Tensor:
        return kernels.rotated_linear(x, weight, bias, R).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(norm), in_dims=(None, 0))(R, x)
    torch.testing.assert_close(each.sum(0), torch.func.grad(norm)(R, x))


def test_a_linear_layer_of_turned_inputs_under_autocast() -> None:
    x, weight, bias, R = (each.detach().float() for each in layer_and_rotation(2, 3))
    R.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.rotated_linear(x, weight, bias, R)
        plain = kernels.plain_rotated_linear(x, weight, bias, R)
    assert found.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0.02)
    assert torch.autograd.grad(found.float().sum(), R)[0].dtype == torch.float32


ROTATIONS: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "cayley": (kernels.cayley, kernels.plain_cayley),
    **{
        f"neumann {terms}": (partial(kernels.neumann, terms=terms), partial(kernels.plain_neumann, terms=terms))
        for terms in (4, 5, 6, 7, 9, 12)
    },
}
BATCH = pytest.mark.parametrize("batch", [(), (3,), (2, 3)])


def entries_of(*batch: int, size: int) -> Tensor:
    """What stands above the diagonals of skew-symmetric matrices."""
    return torch.randn(*batch, size * (size - 1) // 2, dtype=torch.float64)


@BATCH
def test_skew_symmetric_matrices_from_their_entries(batch: tuple[int, ...]) -> None:
    entries = entries_of(*batch, size=4)
    K = kernels.plain_skew(entries, 4)
    assert torch.equal(K, -K.mT) and torch.equal(K[..., 1, 2:], entries[..., 3:5])
    assert torch.equal(K, skew._skew(entries, 4))


@BATCH
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_and_their_gradients(name: str, batch: tuple[int, ...]) -> None:
    kernel, plain = (partial(each, size=4) for each in ROTATIONS[name])
    entries = entries_of(*batch, size=4).requires_grad_()
    torch.testing.assert_close(kernel(entries), plain(entries))
    weights = torch.randn(*batch, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        *(torch.autograd.grad((each(entries) * weights).sum(), entries) for each in (kernel, plain))
    )
    assert gradcheck(kernel, entries) and gradgradcheck(kernel, entries)


@pytest.mark.parametrize("name", ROTATIONS)
def test_backward_of_rotations_keeps_two_matrices_at_most(name: str) -> None:
    entries, kept = entries_of(3, size=4).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: entries):
        ROTATIONS[name][0](entries, 4)
    matrix = torch.Size([3, 4, 4])
    assert kept == ([matrix] if name == "cayley" else [entries.shape, matrix, matrix])


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_under_vmap_and_grad(name: str) -> None:
    kernel, plain = (partial(each, size=3) for each in ROTATIONS[name])
    entries = entries_of(5, 2, size=3)
    each = torch.func.vmap(torch.func.grad(lambda one: kernel(one).pow(3).sum()))(entries)
    for one, gradient in zip(entries.requires_grad_(), each, strict=True):
        torch.testing.assert_close(torch.autograd.grad(plain(one).pow(3).sum(), one)[0], gradient)


def test_what_a_transform_or_inference_makes_is_not_kept() -> None:
    entries = entries_of(2, size=7)  # of a size that nothing else here has
    torch.func.vmap(torch.func.grad(lambda one: kernels.neumann(one, 7, 5).pow(2).sum()))(entries)
    with torch.inference_mode():
        kernels.neumann(entries, 7, 5)
    assert not [key for key in skew._KEPT if 7 in key]
    kernels.neumann(entries, 7, 5)
    assert [key for key in skew._KEPT if 7 in key]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether matrices were so small that their transform is a product."""
    seen: list[bool] = []
    ask = skew._is_small

    def asking(K: Tensor) -> bool:
        seen.append(ask(K))
        return seen[-1]

    monkeypatch.setattr(skew, "_is_small", asking)
    return seen


def with_norm(entries: Tensor, norm: float) -> Tensor:
    """Entries of matrices that have this norm."""
    return entries * (norm / math.sqrt(2)) / torch.linalg.vector_norm(entries, dim=-1, keepdim=True)


@pytest.mark.parametrize("dtype", skew.SMALL)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.999])
@pytest.mark.parametrize("planes", ["all", "one"])
@pytest.mark.parametrize(("batch", "size"), [((), 16), ((3,), 32), ((2, 3), 17)])
def test_small_matrices_are_not_solved_for(
    batch: tuple[int, ...], size: int, planes: str, share: float, dtype: torch.dtype, asked: list[bool]
) -> None:
    entries = entries_of(*batch, size=size)
    if planes == "one":  # in which it does all that its norm allows
        entries[..., 1:] = 0
    entries = with_norm(entries, skew.SMALL[dtype] * share).to(dtype).requires_grad_()
    found = kernels.cayley(entries, size)
    assert asked == [True] and found.dtype == dtype
    expected = kernels.plain_cayley(precise := entries.detach().double().requires_grad_(), size)
    few = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, atol=few, rtol=0)
    torch.testing.assert_close((found @ found.mT).double(), torch.eye(size).double().expand_as(found), atol=few, rtol=0)
    gradient = torch.randn_like(expected)
    (one,), (other,) = (
        torch.autograd.grad(R, each, gradient.to(R.dtype)) for R, each in ((found, entries), (expected, precise))
    )
    torch.testing.assert_close(one, other.to(dtype), atol=100 * few, rtol=0)


def test_larger_narrower_and_broken_matrices_are_solved_for(asked: list[bool]) -> None:
    small = with_norm(entries_of(3, size=16), skew.SMALL[torch.float64] * 0.9)
    one_is_large, one_is_broken = small.clone(), small.clone()
    one_is_large[1] *= 1.2
    one_is_broken[1, 0] = float("nan")
    for entries, size in ((one_is_large, 16), (one_is_broken, 16), (small[:, : 15 * 7], 15), (small[:0], 16)):
        kernels.cayley(entries, size)
    assert not any(asked)
    kernels.cayley(small, 16)
    assert asked[-1]


def test_a_longer_series_comes_nearer_to_the_rotation() -> None:
    entries = entries_of(3, size=4) / 20
    off = [(kernels.neumann(entries, 4, terms) - kernels.cayley(entries, 4)).abs().max() for terms in (4, 5, 9)]
    assert off[0] > off[1] > off[2] and off[2] < 1e-4


def seeded(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Drops the same in each call."""

    def repeatable(*args: Tensor) -> Tensor:
        torch.manual_seed(1)
        return run(*args, 0.25)

    return repeatable


@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
def test_a_dropped_projection_is_that_of_what_is_kept(leading: tuple[int, ...]) -> None:
    x, A = torch.randn(*leading, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    torch.manual_seed(1)
    kept, scale = kernels.keep(x, 0.25)
    assert kept.shape == x.shape and scale == 4 / 3
    torch.testing.assert_close(seeded(kernels.dropped_linear)(x, A), (x * kept * scale) @ A.T)


def test_gradients_of_a_dropped_projection() -> None:
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    A = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    run = seeded(kernels.dropped_linear)
    assert gradcheck(run, (x, A)) and gradgradcheck(run, (x, A))
    assert gradcheck(run, (x.detach(), A)) and gradcheck(run, (x, A.detach()))


BACKENDS = [
    "none",
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_dropout_drops(probability: float, backend: str) -> None:
    x = torch.ones(1000, 1001)
    keep = kernels.keep if backend == "none" else torch.compile(kernels.keep, fullgraph=True, backend=backend)
    kept, scale = keep(x, probability)
    assert abs(kept.double().mean() - (1 - probability)) < 5 * (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(kept.double().mean(0) - (1 - probability)).max() < 0.1
    assert abs(scale * (1 - probability) - 1) < 1e-4
    assert not torch.equal(kept, keep(x, probability)[0])
    rows = kept[:, :1000].double() - (1 - probability)
    assert abs((rows[:, :-1] * rows[:, 1:]).mean()) < 0.002  # neighbours come from the same random bits


def test_all_may_be_dropped() -> None:
    x, A = torch.ones(4, 8), torch.ones(2, 8)
    assert kernels.dropped_linear(x, A, 1.0).abs().max() == 0


def test_autocast_projects_in_its_dtype() -> None:
    x, A = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = kernels.dropped_linear(x, A, 0.5)
    assert low.dtype == torch.bfloat16
    low.sum().backward()
    assert x.grad is not None and A.grad is not None and A.grad.dtype == torch.float32


@pytest.fixture(params=["few columns", "many columns"])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the ranks of these tests are small ones."""
    monkeypatch.setattr("peftcore.kernels.low_rank.FEW", 64 if request.param == "few columns" else 1)


Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def layer_and_factors(*leading: int) -> Factors:
    """x, weight, bias, A and B, of which the first and the last two want gradients."""
    made = [torch.randn(*shape, dtype=torch.float64) for shape in ((*leading, 5), (6, 5), (6,), (2, 5), (6, 2))]
    for wanted in (0, 3, 4):
        made[wanted].requires_grad_()
    return tuple(made)  # type: ignore[return-value]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
def test_a_linear_layer_with_a_low_rank_update(leading: tuple[int, ...], biased: bool) -> None:
    x, weight, bias, A, B = layer_and_factors(*leading)
    found = kernels.low_rank_linear(x, weight, bias if biased else None, A, B, 0.7)
    torch.testing.assert_close(found, x @ (weight + 0.7 * B @ A).T + (bias if biased else 0.0))


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_of_a_low_rank_update(dropout: float) -> None:
    x, weight, bias, A, B = layer_and_factors(2, 3)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(1)
        return kernels.low_rank_linear(x, weight, bias, A, B, 0.7, dropout)

    assert gradcheck(run, (x, A, B)) and gradgradcheck(run, (x, A, B))
    for kept in ((x.detach(), A, B), (x, A.detach(), B), (x, A, B.detach())):
        assert gradcheck(run, kept) and gradgradcheck(run, kept)


def test_a_low_rank_update_keeps_the_input_for_what_trains_alone() -> None:
    x, weight, bias, A, B = layer_and_factors(7)
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kernels.low_rank_linear(x, weight, bias, A.detach(), B, 0.7)
        assert x.shape not in kept and (7, 2) in kept
        kept.clear()
        kernels.low_rank_linear(x, weight, bias, A, B.detach(), 0.7)
        assert x.shape in kept and (7, 2) not in kept


def test_a_low_rank_update_drops_what_dropout_keeps_not() -> None:
    x, weight, bias, A, B = layer_and_factors(2, 3)
    torch.manual_seed(1)
    kept, scale = kernels.keep(x, 0.25)
    torch.manual_seed(1)
    found = kernels.low_rank_linear(x, weight, bias, A, B, 0.7, 0.25)
    torch.testing.assert_close(found, x @ weight.T + bias + 0.7 * (x * kept * scale) @ A.T @ B.T)
    assert torch.equal(kernels.low_rank_linear(x, weight, bias, A, B, 0.7, 1.0), F.linear(x, weight, bias))


def test_a_low_rank_update_under_vmap_and_grad() -> None:
    x, weight, bias, A, B = (each.detach() for each in layer_and_factors(7))

    def norm(A: Tensor, x: Tensor) -> Tensor:
        return kernels.low_rank_linear(x, weight, bias, A, B, 0.7).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(norm), in_dims=(None, 0))(A, x)
    torch.testing.assert_close(each.sum(0), torch.func.grad(norm)(A, x))


def test_a_low_rank_update_under_autocast() -> None:
    x, weight, bias, A, B = (each.detach().float() for each in layer_and_factors(2, 3))
    A.requires_grad_(), B.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.low_rank_linear(x, weight, bias, A, B, 0.7)
        plain = kernels.plain_low_rank_linear(x, weight, bias, A, B, 0.7)
    assert found.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0.02)
    assert {each.dtype for each in torch.autograd.grad(found.float().sum(), (A, B))} == {torch.float32}


Scaled = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def layer_and_scaled_factors(*leading: int) -> Scaled:
    """x, weight, bias, A, inner, B and outer, of which the first and the vectors want gradients."""
    x, weight, bias, A, B = (each.detach() for each in layer_and_factors(*leading))
    inner, outer = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (2, 6))
    return x.requires_grad_(), weight, bias, A, inner, B, outer


def _taking_each(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def taking_each(x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Any) -> Tensor:
        return kernel(x, weight, bias, kernels.ScaledFactors(*factors[:4]), *factors[4:])

    return taking_each


scaled_linear = _taking_each(kernels.scaled_low_rank_linear)
plain_scaled_linear = _taking_each(kernels.plain_scaled_low_rank_linear)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
def test_a_linear_layer_with_a_scaled_low_rank_update(leading: tuple[int, ...], biased: bool) -> None:
    x, weight, bias, *update = layer_and_scaled_factors(*leading)
    A, inner, B, outer = update
    expected = x @ (weight + outer.diag() @ B @ inner.diag() @ A).T + (bias if biased else 0.0)
    for run in (scaled_linear, plain_scaled_linear):
        torch.testing.assert_close(run(x, weight, bias if biased else None, A, inner, B, outer), expected)


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_of_a_scaled_low_rank_update(dropout: float) -> None:
    x, weight, bias, A, inner, B, outer = layer_and_scaled_factors(2, 3)

    def run(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        torch.manual_seed(1)
        return scaled_linear(x, weight, bias, A, inner, B, outer, dropout)

    assert gradcheck(run, (x, inner, outer)) and gradgradcheck(run, (x, inner, outer))
    for kept in ((x.detach(), inner, outer), (x, inner.detach(), outer), (x, inner, outer.detach())):
        assert gradcheck(run, kept) and gradgradcheck(run, kept)


def test_gradients_of_gradients_of_scales_alone() -> None:
    """The gradient of the scales alone is differentiated, so nothing comes back through the output itself."""
    x, *frozen, inner, B, outer = layer_and_scaled_factors(4)

    def of_scales(x: Tensor, inner: Tensor, outer: Tensor) -> tuple[Tensor, ...]:
        y = scaled_linear(x, *frozen, inner, B, outer)
        return torch.autograd.grad(y.sum(), (inner, outer), create_graph=True)

    assert gradcheck(of_scales, (x, inner, outer))


def test_a_scaled_low_rank_update_drops_what_dropout_keeps_not() -> None:
    x, weight, bias, A, inner, B, outer = layer_and_scaled_factors(2, 3)
    torch.manual_seed(1)
    kept, scale = kernels.keep(x, 0.25)
    torch.manual_seed(1)
    found = scaled_linear(x, weight, bias, A, inner, B, outer, 0.25)
    torch.testing.assert_close(found, x @ weight.T + bias + ((x * kept * scale) @ A.T * inner) @ B.T * outer)


def test_a_scaled_low_rank_update_of_matrices_that_train_is_the_plain_one() -> None:
    x, weight, bias, A, inner, B, outer = layer_and_scaled_factors(2, 3)
    A.requires_grad_(), B.requires_grad_()
    assert gradcheck(scaled_linear, (x, weight, bias, A, inner, B, outer))


def test_a_scaled_low_rank_update_under_vmap_and_grad() -> None:
    x, weight, bias, A, inner, B, outer = (each.detach() for each in layer_and_scaled_factors(7))

    def norm(inner: Tensor, x: Tensor) -> Tensor:
        return scaled_linear(x, weight, bias, A, inner, B, outer).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(norm), in_dims=(None, 0))(inner, x)
    torch.testing.assert_close(each.sum(0), torch.func.grad(norm)(inner, x))


def test_a_scaled_low_rank_update_under_autocast() -> None:
    x, weight, bias, A, inner, B, outer = (each.detach().float() for each in layer_and_scaled_factors(2, 3))
    inner.requires_grad_(), outer.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = scaled_linear(x, weight, bias, A, inner, B, outer)
    assert found.dtype == torch.bfloat16
    plain = plain_scaled_linear(x, weight, bias, A, inner, B, outer)
    torch.testing.assert_close(found.float(), plain, atol=0.1, rtol=0.05)
    assert {each.dtype for each in torch.autograd.grad(found.float().sum(), (inner, outer))} == {torch.float32}


EYE, ONES = torch.eye(10), torch.ones(10)

DROPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "projection": lambda x: kernels.dropped_linear(x, EYE, 0.25),
    "low-rank update": lambda x: kernels.low_rank_linear(x, torch.zeros(10, 10), None, EYE, EYE, 1.0, 0.25),
    "scaled update": lambda x: scaled_linear(x, torch.zeros(10, 10), None, EYE, ONES, EYE, ONES, 0.25),
}
"""Of each, what comes out is what is kept of x."""


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("name", DROPPING)
def test_what_drops_under_vmap_and_grad(name: str, randomness: str) -> None:
    of_row = torch.func.grad(lambda x: DROPPING[name](x).sum())
    each = torch.func.vmap(of_row, randomness=randomness)(torch.ones(400, 10))
    assert set(each.unique().tolist()) == {0, ONES.div(0.75)[0].item()}
    assert torch.equal(each, each[:1].expand_as(each)) == (randomness == "same")
    assert randomness == "same" or abs(each.mean() - 1) < 0.05


@pytest.mark.parametrize("shapes", [((2, 3, 4), (4,), (2, 3, 4)), ((2, 3, 4), (3, 1), (2, 3, 4)), ((4,), (4,), (2, 4))])
def test_a_sum_with_something_scaled(shapes: tuple[tuple[int, ...], ...]) -> None:
    y, gain, z = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    torch.testing.assert_close(kernels.add_scaled(y, gain, z), kernels.plain_add_scaled(y, gain, z))
    assert gradcheck(kernels.add_scaled, (y, gain, z)) and gradgradcheck(kernels.add_scaled, (y, gain, z))
    assert gradcheck(kernels.add_scaled, (y, gain.detach(), z)) and gradcheck(kernels.add_scaled, (y, gain, z.detach()))


def test_a_sum_with_something_scaled_under_vmap_and_grad() -> None:
    y, gain, z = (torch.randn(*shape, dtype=torch.float64) for shape in ((4,), (4,), (3, 4)))
    each = torch.func.vmap(torch.func.grad(lambda z: kernels.add_scaled(y, gain, z).sum()))(z)
    torch.testing.assert_close(each, gain.expand(3, 4))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_scaled_bases(batch: tuple[int, ...]) -> None:
    A = torch.randn(2, 5, dtype=torch.float64)
    L, G = (torch.randn(*batch, *shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (3, 5)))
    expected = torch.einsum("ri,...rb,...bi->...rbi", A, L, G)
    torch.testing.assert_close(kernels.scaled_bases(A, L, G), expected)
    torch.testing.assert_close(kernels.plain_scaled_bases(A, L, G), expected)
    run = partial(kernels.scaled_bases, A)
    assert gradcheck(run, (L, G)) and gradgradcheck(run, (L, G))
    assert gradcheck(kernels.scaled_bases, (A.requires_grad_(), L, G))


def test_scaled_bases_under_vmap_and_grad() -> None:
    A, L, G = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5), (4, 2, 3), (4, 3, 5)))
    each = torch.func.vmap(torch.func.grad(lambda L, G: kernels.scaled_bases(A, L, G).pow(2).sum()))(L, G)
    together = torch.func.grad(lambda L: kernels.scaled_bases(A, L, G).pow(2).sum())(L)
    torch.testing.assert_close(each, together)
