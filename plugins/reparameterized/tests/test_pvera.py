"""PVeRA beside peft's, drawn alike, and beside its equation; what is drawn when, and the divergence."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation, fill, hosted
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.testing import HOSTS, against, conformance

RANK = 5


READ = "torch's attention reads its weight for queries and values, so there are no activations to draw: the mean acts"


@conformance("pvera", options={"*": {"rank": 16}}, expected_failures={"draws_are_declared-encoder": READ})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_equation_of_the_mean(kind: str) -> None:
    """All of it where nothing is drawn; the half of d for the variance gets no gradient."""
    operator = adapted(kind, "pvera", rank=RANK)[2]
    A, B = (t.clone() for t in (operator.basis.module.A, operator.basis.module.B))
    assert A.shape[0] == 2 * RANK and not operator.b.any() and (operator.d - 0.1).abs().max() <= 1e-6

    def scaled(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        update = torch.diag(tensors["b"]) @ B @ torch.diag(tensors["d"][:RANK]) @ A[:RANK]
        return weight + update.view(weight.shape)

    assert_equation(kind, "pvera", scaled, rank=RANK, sample="never")


class Two(nn.Module):
    """Layers of several sizes: no site is as large as the matrices both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 7), Conv1D(9, 7), nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


TARGET = ["first", "second", "third"]


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    for each in "AB":
        held = getattr(layer, f"pvera_{each}")
        assert torch.equal(held[ADAPTER].float(), operator.basis.module.get_buffer(each).float())  # drawn alike
        held[ADAPTER] = operator.basis.module.get_buffer(each)
    yield Pair(f"{site.path}.d", operator.d, layer.pvera_lambda_d[ADAPTER], lambda t: t)
    yield Pair(f"{site.path}.b", operator.b, layer.pvera_lambda_b[ADAPTER], lambda t: t)


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("sample", ["training", "always"])
@against("peft 0.21", "pvera")
def test_beside_peft(sample: str) -> None:
    """In training both draw the same from torch's generator, gradients of all of d too; in evaluation with `always`."""
    torch.manual_seed(0)
    config = peft.PveraConfig(
        r=RANK, projection_prng_key=3, target_modules=TARGET, sample_at_inference=sample == "always"
    )
    options = {"target": TARGET, "rank": RANK, "projection_seed": 3, "dtype": "float64", "sample": sample}
    both = Both(Two().double(), "pvera", options, config, pairs)
    ours = sum(p.numel() for p in both.injection.parameters())
    assert ours == sum(p.numel() for p in both.tuner.parameters() if p.requires_grad) == 3 * 2 * RANK + 7 + 9 + 10
    x = torch.randn(4, 12).double()
    for model in (both.base, both.ours, both.tuner):
        model.train()
    both.assert_same_gradients(*both.assert_same_outputs(lambda model: model(x)))
    for model in (both.base, both.ours, both.tuner):
        model.eval()
    drawn = both.assert_same_outputs(lambda model: model(x))[0]
    torch.manual_seed(1)
    assert (difference(both.ours(x), drawn) > 1e-3) == (sample == "always")
    both.assert_same_merged()


def test_what_is_drawn_has_the_mean_and_the_variance() -> None:
    host, _, operator = adapted("linear", "pvera", rank=RANK)
    fill(operator)
    base, _ = hosted("linear")
    x = torch.randn(1, 12).double()
    A, B = operator.basis.module.A, operator.basis.module.B
    mean, log_variance = (operator.d * (A @ x[0])).split(RANK)
    many = (host.train()(x.expand(20_000, 12)) - base(x)) / operator.b
    assert (many.mean(0) - B @ mean).abs().max() <= 0.05
    assert difference(many.T.cov(), B @ torch.diag(log_variance.exp()) @ B.T) <= 0.05
    never = adapted("linear", "pvera", rank=RANK, sample="never")[0].train()
    assert torch.equal(never(x), never(x))


def test_divergence_is_a_loss() -> None:
    host, injection, operator = adapted("linear", "pvera", rank=RANK, kl=0.3)
    fill(operator)
    x = torch.randn(4, 12).double()
    low = operator.d * (x @ operator.basis.module.A.T)
    mean, log_variance = low.split(RANK, -1)
    expected = 0.3 * kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean()
    host.train()(x)
    assert difference(injection.losses(), expected.float()) <= 1e-6


def test_padding_has_no_part_in_the_divergence() -> None:
    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model.double(), "pvera", rank=RANK, kl=0.3, sample="never", dtype="float64")
    for operator in injection.operators.values():
        fill(operator)
    ids = inputs["input_ids"][:, :4]
    found = []
    for more in (0, 3):
        padded = nn.functional.pad(ids, (0, more), value=1)
        mask = nn.functional.pad(torch.ones_like(ids), (0, more))
        model.train()(input_ids=padded, attention_mask=mask)
        found.append(injection.losses())
    assert difference(*found) <= 1e-12


def test_sites_share_one_pair_unless_their_options_differ() -> None:
    host = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3))
    overrides = {"1": {"projection_seed": 1}, "2": {"rank": 2}}
    injection = peftcore.apply(deepcopy(host), "pvera", target="all-linear", rank=3, overrides=overrides)
    shapes = {name: (tuple(basis.A.shape), tuple(basis.B.shape)) for name, basis in injection.shared.items()}
    pair = ((6, 8), (8, 3))
    assert shapes == {"basis_0_3": pair, "basis_1_3": pair, "basis_0_2": ((4, 8), (8, 2))}
