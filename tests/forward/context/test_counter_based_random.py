"""Random numbers by the places of entries: those of a shorter tensor are the first ones of a longer one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftcore.forward.context.counter_based_random import CountedDraws, mixed
from peftcore.layers.kernels import dropout_mask, dropped_linear

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout of a module": nn.Dropout(0.4),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.4, inplace=True),
    "a mask of a kernel": lambda x: x * dropout_mask(x, 0.4)[0],
    "dropped channels": lambda x: F.dropout1d(x, 0.4) if x.dim() == 3 else F.dropout(x, 0.4),
    "native_dropout": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "rand": lambda x: torch.rand(x.shape, dtype=x.dtype),
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(*x.shape, dtype=x.dtype),
    "randn_like": torch.randn_like,
    "normal_": lambda x: torch.empty_like(x).normal_(1.0, 2.0),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-3, 2),
    "exponential_": lambda x: torch.empty_like(x).exponential_(2.0),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.3),
    "bernoulli_ of chances": lambda x: torch.empty_like(x).bernoulli_(torch.full_like(x, 0.3)),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.3)),
    "bernoulli of a number": lambda x: torch.bernoulli(x, 0.3),
    "randint": lambda x: torch.randint(7, x.shape),
    "randint from": lambda x: torch.randint(-7, 7, x.shape),
    "randint_like": lambda x: torch.randint_like(x, 7),
    "randint_like from": lambda x: torch.randint_like(x, -7, 7),
    "gumbel_softmax": lambda x: -torch.empty_like(x).exponential_().log(),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def drawn(kind: str, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64, rows: int = 2) -> Tensor:
    with CountedDraws(seed, range(rows), rows):
        torch.zeros(3).uniform_()  # so that it is no first draw
        return KINDS[kind](torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_those_of_a_shorter_tensor_are_the_first_of_a_longer_one(kind: str) -> None:
    state = torch.get_rng_state()
    long = drawn(kind, 2, 9, 6)
    assert torch.equal(drawn(kind, 2, 9, 6), long) and torch.equal(torch.get_rng_state(), state)
    if kind != "dropped channels":  # whose second dimension has one number for all behind it
        assert not torch.equal(long[0], long[1]) and not torch.equal(long[:, 0], long[:, 1])
    assert not torch.equal(drawn(kind, 2, 9, 6, seed=2), long)
    assert torch.equal(drawn(kind, 2, 5, 6), long[:, :5])
    assert torch.equal(drawn(kind, 2, 5, 4), long[:, :5, :4])
    assert torch.equal(drawn(kind, 10, 6), drawn(kind, 18, 6).view(2, 9, 6)[:, :5].flatten(0, 1))  # tokens without rows
    if kind != "dropped channels":
        heads = drawn(kind, 2, 3, 7, 7)
        assert torch.equal(drawn(kind, 2, 3, 4, 4), heads[:, :, :4, :4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_distributed_as_torchs(dtype: torch.dtype) -> None:
    """Mean, variance, ends, and no dependence between neighbours in any dimension."""
    shape = (64, 50, 80)
    error = 5 / 64 / 50**0.5 / 80**0.5 * 64**0.5  # five standard errors of a mean of this many
    assert error < 0.011
    uniform = drawn("rand_like", *shape, dtype=dtype, rows=64).double()
    assert 0 <= uniform.min() < 1e-2 and 0.98 < uniform.max() < 1
    normal = drawn("randn_like", *shape, dtype=dtype, rows=64).double()
    assert normal.isfinite().all() and normal.abs().max() < 7
    rates = drawn("exponential_", *shape, dtype=dtype, rows=64).double()
    assert rates.min() > 0 and rates.isfinite().all()
    rough = 4 * torch.finfo(dtype).eps
    for found, mean, deviation in ((uniform, 0.5, 12**-0.5), (normal, 0.0, 1.0), (rates, 0.5, 0.5)):
        assert abs(found.mean() - mean) < error * deviation + rough
        assert abs(found.std() / deviation - 1) < 2 * error + rough
        centred = (found - found.mean()) / found.std()
        for dim in range(3):
            size = found.shape[dim] - 1
            assert abs((centred.narrow(dim, 0, size) * centred.narrow(dim, 1, size)).mean()) < error
    assert abs((drawn("dropout", *shape, dtype=dtype, rows=64) == 0).double().mean() - 0.4) < error
    whole = drawn("randint from", *shape, dtype=dtype, rows=64)
    counts = torch.bincount((whole + 7).flatten(), minlength=14).double()
    assert len(counts) == 14 and (counts / counts.mean() - 1).abs().max() < 0.05


def test_dropout_scales_and_its_ends_are_torchs() -> None:
    x = torch.ones(2, 300)
    with CountedDraws(1, range(2), 2):
        assert set(F.dropout(x, 0.5).unique().tolist()) == {0.0, 2.0}
        assert set(torch.native_dropout(x, 0.75, True)[0].unique().tolist()) == {0.0, 4.0}
        assert torch.equal(torch.native_dropout(x, 0.75, False)[0], x)
        assert not torch.native_dropout(x, 1.0, True)[0].any()
        assert torch.equal(F.dropout(x, 0.0), x) and not F.dropout(x, 1.0).any()
        assert not torch.empty(2, 9).bernoulli_(0.0).any() and torch.empty(2, 9).bernoulli_(1.0).all()
        assert torch.empty(0, 3).uniform_().shape == (0, 3) and torch.rand(()).shape == ()


def test_gradients_are_those_of_what_was_kept() -> None:
    x = torch.randn(2, 5, 6, requires_grad=True)
    for run in (lambda: F.dropout(x, 0.4), lambda: torch.native_dropout(x, 0.4, True)[0]):
        with CountedDraws(1, range(2), 2):
            y = run()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, (y != 0) / 0.6)
    A = torch.randn(3, 6, requires_grad=True)
    with CountedDraws(1, range(2), 2):
        y = dropped_linear(x, A, 0.4)
    with CountedDraws(1, range(2), 2):
        mask, scale = dropout_mask(x, 0.4)
    torch.testing.assert_close(y, (x * mask * scale) @ A.T)


def test_rows_among_others_draw_what_they_draw_alone() -> None:
    """Given all rows, or its own ones that it picks."""
    alone = drawn("rand", 2, 5)
    with CountedDraws(1, [0, 0, 1, 1], 2):
        torch.zeros(3).uniform_()
        among = torch.rand(4, 5, dtype=torch.float64)
    assert torch.equal(among[[0, 2]], alone)
    with CountedDraws(1, [0, 0, 1, 2], 3):
        torch.zeros(1).uniform_()
        picked = torch.rand(3, 5, dtype=torch.float64)
    assert torch.equal(picked, drawn("rand", 3, 5, rows=3))


def test_each_draw_is_another_one_and_torchs_generators_stand_still() -> None:
    state = torch.get_rng_state()
    with CountedDraws(1, range(2), 2):
        one, other = torch.rand(2, 4), torch.rand(2, 4)
    assert not torch.equal(one, other) and torch.equal(torch.get_rng_state(), state)


def test_what_it_does_not_know_and_what_has_a_generator_comes_from_torch() -> None:
    torch.manual_seed(3)
    wanted = torch.randperm(9)
    given = torch.rand(4, generator=torch.Generator().manual_seed(5))
    filled = torch.empty(4).uniform_(generator=torch.Generator().manual_seed(5))
    torch.manual_seed(3)
    with CountedDraws(1, range(2), 2) as draws:
        assert torch.equal(torch.empty(4).uniform_(generator=torch.Generator().manual_seed(5)), filled)
        assert torch.equal(torch.randperm(9), wanted)
        assert torch.equal(torch.rand(4, generator=torch.Generator().manual_seed(5)), given)
        draws.rests = True
        torch.manual_seed(3)
        assert torch.equal(torch.randperm(9), wanted)
        torch.manual_seed(4)
        rested = torch.rand(4)
    torch.manual_seed(4)
    assert torch.equal(torch.rand(4), rested)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_what_is_drawn(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bits: no number is infinite, a uniform one is below 1, and an exponential one has a logarithm."""
    for bits in (-(2**31), 2**31 - 1, -1, 0):
        monkeypatch.setattr(CountedDraws, "bits", lambda *_, bits=bits: torch.full((2, 3), bits, dtype=torch.int32))
        x = torch.ones(2, 3, dtype=dtype)
        with CountedDraws(1, range(2), 2):
            assert torch.rand_like(x).min() >= 0 and torch.rand_like(x).max() < 1
            assert torch.randn_like(x).isfinite().all()
            assert torch.empty_like(x).exponential_().log().isfinite().all()
            assert set(torch.randint_like(x, 7).unique().tolist()) <= {0.0, 3.0, 6.0}
            assert set(torch.empty_like(x).bernoulli_(0.5).unique().tolist()) <= {0.0, 1.0}


def test_out_of_it_torch_draws_as_ever() -> None:
    torch.manual_seed(4)
    wanted = torch.rand(4)
    with CountedDraws(1, range(2), 2) as draws:
        before = torch.rand(4)
        torch.manual_seed(4)
        with draws.out():
            assert torch.equal(torch.rand(4), wanted)
        assert draws.count == 1 and not torch.equal(torch.rand(4), before)
        with CountedDraws(2, range(2), 2), draws.out():  # another one stands in front of it
            assert torch.rand(4).shape == (4,)


def test_a_checkpoint_that_begins_inside_draws_in_backward_what_it_drew() -> None:
    """Backward repeats it outside of the block, where torch puts its generators back."""
    x = torch.randn(2, 50, requires_grad=True)
    with CountedDraws(1, range(2), 2) as draws:
        y = checkpoint(lambda x: F.dropout(x, 0.5).sin(), x, use_reentrant=False)
        F.dropout(x, 0.5)
    assert draws.count == 1
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient == 0, y == 0)


def test_within_a_checkpoint_that_began_outside_they_are_by_place() -> None:
    def block(x: Tensor) -> Tensor:
        with CountedDraws(1, range(2), 2):
            return F.dropout(x, 0.5).sin()

    x = torch.randn(2, 50, requires_grad=True)
    for reentrant in (False, True):
        y = checkpoint(block, x, use_reentrant=reentrant)
        assert torch.equal(y, block(x))
        x.grad = None
        y.sum().backward()
        assert x.grad is not None and torch.equal(x.grad == 0, y == 0)


def test_seeds_are_mixed() -> None:
    found = {mixed(seed, step, site) for seed in range(4) for step in range(4) for site in ("a", "b")}
    assert len(found) == 32 and all(0 <= each < 2**63 for each in found)
    assert mixed(1, 23) != mixed(12, 3)
