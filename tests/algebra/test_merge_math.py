"""Sums and merges of tensors: identities, peft's functions where they mean the same, examples by hand where not."""

import math

import peft.utils.merge_utils as theirs
import pytest
import torch
from algebra_toys import F64, close, drawn, rows
from torch import Tensor

from peftcore.algebra import merge_math as algebra
from peftcore.testing.tools import default_dtype


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.3]])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_the_numbers_of_peft_where_it_means_the_same(weights: list[float], density: float) -> None:
    taus, w = [drawn(7, 9, seed=seed) for seed in range(3)], torch.tensor(weights, dtype=F64)
    assert close(algebra.linear(taus, weights), theirs.task_arithmetic(taus, w))
    pruned = algebra.linear([algebra.magnitude_prune(tau, density) for tau in taus], weights)
    assert close(pruned, theirs.magnitude_prune(taus, w, density))
    same = [1.0, 1.0, 1.0]  # peft elects before it weighs
    for sign in ("total", "frequency"):
        expected = theirs.ties(taus, torch.tensor(same, dtype=F64), density, sign)
        ours = algebra.ties(taus, same, density, sign)
        settled = theirs.ties([-tau for tau in taus], torch.tensor(same, dtype=F64), density, sign) == -expected
        assert settled.double().mean() > (0.99 if sign == "total" else 0.6)
        assert close(ours[settled], expected[settled])  # no draws: peft takes +1


def test_dare_as_in_peft_with_its_masks() -> None:
    taus, weights = [drawn(20, 30, seed=seed) for seed in range(2)], [1.0, -0.5]
    torch.manual_seed(3)
    expected = theirs.dare_linear(taus, torch.tensor(weights, dtype=F64), 0.3)
    torch.manual_seed(3)
    masks = [torch.bernoulli(torch.full_like(tau, 0.3)) for tau in taus]
    assert close(algebra.linear([tau * mask / 0.3 for tau, mask in zip(taus, masks, strict=True)], weights), expected)
    ours = algebra.dare_linear(taus[:1], [1.0], 0.3, torch.Generator().manual_seed(3))
    kept = ours != 0
    assert abs(kept.double().mean() - 0.3) < 0.06 and close(ours[kept], taus[0][kept] / 0.3)
    assert torch.equal(ours, algebra.dare_linear(taus[:1], [1.0], 0.3, torch.Generator().manual_seed(3)))


def test_masks_do_not_depend_on_the_default_dtype() -> None:
    def mask() -> Tensor:
        return algebra.random_mask((9, 50), 0.3, torch.Generator().manual_seed(4))

    expected = mask()
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            assert torch.equal(mask(), expected)


def test_dropping_and_rescaling_keeps_the_mean() -> None:
    tau, generator, times = drawn(6, 5), torch.Generator().manual_seed(0), 4000
    mean = sum(algebra.random_prune(tau, 0.25, generator) for _ in range(times)) / times
    deviation = tau.abs() * (0.75 / 0.25 / times) ** 0.5
    assert ((mean - tau).abs() < 5 * deviation).all()
    assert algebra.random_prune(tau, 0.25, generator, rescale=False).abs().max() <= tau.abs().max()


def test_ties_by_hand() -> None:
    a, b, c = rows([5.0, 1.0, -3.0, 0.5, 0.0], [-2.0, 0.1, -1.0, 4.0, 0.0], [1.0, -6.0, 2.0, 0.2, 0.0])
    # two of five are kept: a (5, ., -3, ., .), b (-2, ., ., 4, .), c (., -6, 2, ., .); signs + - - + and any
    assert algebra.ties([a, b, c], [1.0] * 3, 0.4).tolist() == [5.0, -6.0, -3.0, 4.0, 0.0]
    # all is kept: sums 4, -4.9, -2, 4.7; by number of tasks: + + - +
    assert algebra.ties([a, b, c], [1.0] * 3, 1.0).tolist() == pytest.approx([3.0, -6.0, -2.0, 4.7 / 3, 0.0])
    by_number = algebra.ties([a, b, c], [1.0] * 3, 1.0, "frequency").tolist()
    assert by_number == pytest.approx([3.0, 0.55, -2.0, 4.7 / 3, 0.0])


def test_a_draw_takes_the_sign_of_most_values_and_a_negated_task_votes_negated() -> None:
    a, b = rows([2.0, -1.0, -1.0], [-2.0, -1.0, -3.0])
    assert algebra.ties([a, b], [1.0, 1.0], 1.0).tolist() == [-2.0, -1.0, -2.0]  # the authors'; peft gives +2 there
    assert algebra.ties([a], [-1.0], 1.0).tolist() == [-2.0, 1.0, 1.0]
    # weighed, -2 and 3 are -2 and -3, which agree; in peft 3 is elected first
    small, large = rows([-2.0], [3.0])
    assert algebra.ties([small, large], [1.0, -1.0], 1.0).tolist() == [-2.5]
    assert theirs.ties([small, large], torch.tensor([1.0, -1.0], dtype=F64), 1.0).tolist() == [-3.0]


def test_ties_lets_gradients_into_tasks_that_start_at_zero() -> None:
    taus = [torch.zeros(4, 5, requires_grad=True) for _ in range(2)]
    algebra.ties(taus, [1.0, 1.0], 0.2).sum().backward()
    assert all(torch.equal(tau.grad, torch.full((4, 5), 0.5)) for tau in taus)


def test_slerp_by_its_ends_and_its_arc() -> None:
    a, b = drawn(3, 4, seed=1), drawn(3, 4, seed=2)
    assert close(algebra.slerp(a, b, 0.0), a) and close(algebra.slerp(a, b, 1.0), b)
    x, y = rows([1.0, 0.0], [0.0, 1.0])
    assert close(algebra.slerp(x, y, 1 / 3), torch.tensor([3**0.5 / 2, 0.5], dtype=F64))
    assert close(algebra.slerp(x, 3 * x, 0.5), 2 * x)


@pytest.mark.parametrize(("lead", "kernel"), [((), ()), ((3,), ()), ((), (2, 3))])
def test_factors_side_by_side_are_the_sum_and_svd_knows_its_error(
    lead: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    def factors(rank: int, seed: int) -> algebra.Factors:
        return drawn(*lead, rank, 6, *kernel, seed=seed), drawn(*lead, 5, rank, seed=seed + 9), 0.5 + seed

    every, weights = [factors(2, 0), factors(1, 1), factors(3, 2)], [1.0, -2.0, 0.3]
    total = torch.zeros(*lead, 5, 6 * math.prod(kernel), dtype=F64)
    for w, (A, B, s) in zip(weights, every, strict=True):
        total += w * s * torch.einsum("...or,...ri->...oi", B, A.flatten(len(lead) + 1))
    total = total.view(*lead, 5, 6, *kernel)
    joined = algebra.cat(every, weights)
    assert joined[0].shape == (*lead, 6, 6, *kernel) and close(algebra.product(joined), total)
    assert float(algebra.product(algebra.cat([every[0], every[0]], [0.7, -0.7])).abs().max()) < 1e-12
    for rank in (1, 3, 5, 8):
        near, error = algebra.nearest(total, rank, len(lead))
        kept = min(rank, 5)
        assert near[0].shape == (*lead, kept, 6, *kernel) and near[1].shape == (*lead, 5, kept)
        assert abs(float((algebra.product(near) - total).norm() / total.norm()) - error) < 1e-9
        assert (error < 1e-12) == (rank >= 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [6, 300])
def test_columns_that_are_rounding_alone_are_cut_and_no_others(dtype: torch.dtype, side: int) -> None:
    delta = torch.stack([(drawn(side, rank) @ drawn(rank, side, seed=3)).to(dtype) for rank in (2, 3)])
    cut, _ = algebra.nearest(delta, 6, 1)
    assert cut[0].shape == (2, 3, side) and cut[1].shape == (2, side, 3)
    lost = torch.linalg.vector_norm(algebra.product(cut) - delta) / torch.linalg.vector_norm(delta)
    assert float(lost) < 20 * torch.finfo(dtype).eps
    small = torch.diag(torch.tensor([1.0, 100 * torch.finfo(dtype).eps], dtype=dtype))
    assert algebra.nearest(small, 2)[0][1].shape[-1] == 2
    nothing = algebra.nearest(torch.zeros_like(delta), 2, 1)[0]
    assert nothing[0].shape == (2, 0, side) and nothing[1].shape == (2, side, 0)


def test_the_nearest_in_outputs_is_the_nearest_of_the_whitened_matrix() -> None:
    x, delta = drawn(40, 7, seed=1) * torch.linspace(0.1, 3, 7), drawn(9, 7, seed=2)
    root = torch.linalg.cholesky(x.T @ x / len(x))  # another root of the moment than the one of its eigenvectors
    U, S, V = torch.linalg.svd(delta @ root, full_matrices=False)
    expected = U[:, :3] * S[:3] @ V[:3] @ torch.linalg.inv(root)
    factors, error = algebra.nearest(delta, 3, moment=x.T @ x / len(x))
    near = algebra.product(factors)
    assert close(near, expected)
    assert error == pytest.approx(float((x @ (delta - near).T).norm() / (x @ delta.T).norm()))
    plain, plain_error = algebra.nearest(delta, 3)
    same, same_error = algebra.nearest(delta, 3, moment=torch.eye(7, dtype=F64))
    assert close(algebra.product(same), algebra.product(plain)) and same_error == pytest.approx(plain_error)
    dead = torch.zeros(7, 7, dtype=F64)
    dead[0, 0] = 1.0  # inputs along one direction alone: one column is enough, and nothing is inverted
    assert algebra.nearest(delta, 1, moment=dead)[1] < 1e-12
