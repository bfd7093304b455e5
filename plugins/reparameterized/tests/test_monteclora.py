"""MonteCLoRA beside peft's, with the same draws, and beside its distributions."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, fill, hosted
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import nn
from torch.distributions import Dirichlet, Normal, Wishart, kl_divergence
from two_layers import Two

import peftcore
from peftcore.testing import against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
RANK, ALPHA, SAMPLES = 4, 9.0, 5
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "samples": SAMPLES, "sample_scale": 0.3}
FLOAT32 = 2e-6
"""Peft takes its roots in float32."""
READ = "torch's attention and a grouped convolution are read, so there are no inputs to draw for: the mean acts"


@conformance(
    "monteclora",
    options={"*": {"rank": RANK, "alpha": 12.0, "sample_scale": 0.01}},
    expected_failures={
        "draws_are_declared-encoder": READ,
        "every_trainable_tensor_learns-encoder": READ,
        "every_trainable_tensor_learns-convnet": READ,
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("kind", list(KINDS))
def test_equation_of_the_mean(kind: str) -> None:
    """In evaluation it is LoRA: t and p get no gradient."""
    host, injection, operator = adapted(kind, "monteclora", **OPTIONS)
    fill(operator)
    x = hosted(kind)[1]
    host.eval()(x).square().sum().backward()
    assert operator.t.grad is None and operator.p.grad is None
    lora, other, theirs = adapted(kind, "lora", rank=RANK, alpha=ALPHA)
    theirs.load_state_dict({"A": operator.A, "B": operator.B})
    assert difference(host(x), lora.eval()(x)) <= 1e-14
    injection.bake()
    other.bake()
    assert difference(host(x), lora(x)) <= 1e-12


def two() -> Two:
    """Two sizes, so that what belongs to which layer matters."""
    return Two(nn.Linear(12, 7), nn.Linear(7, 9))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    sampler = layer.lora_monteclora_sampler[ADAPTER]
    yield Pair(f"{site.path}.A", operator.A, layer.lora_A[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.B", operator.B, layer.lora_B[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.t", operator.t, sampler.std_prior, lambda t: t)
    yield Pair(f"{site.path}.p", operator.p, sampler.expert_weights_prior, lambda t: t)


def both(training: bool, entropy: bool = False, kl: float = 1e-5) -> Both:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=9,
        target_modules=["first", "second"],
        monteclora_config=peft.tuners.lora.MontecloraConfig(
            num_samples=SAMPLES, sample_scaler=0.3, kl_loss_weight=kl, use_entropy=entropy, buffer_size=1
        ),
    )
    ours = {"target": ["first", "second"], **OPTIONS, "dtype": "float64", "kl": kl, "entropy": entropy}
    found = Both(two().double().train(training), "monteclora", ours, config, pairs)
    found.tuner.double()
    for path, operator in found.injection.operators.items():
        sampler = found.tuner.model.get_submodule(path).lora_monteclora_sampler[ADAPTER]
        eps, chi, eta = operator.drawn()
        operator.drawn = lambda drawn=(eps, chi, eta): drawn
        same = {"z_mvn": eps.mT, "z_wishart": torch.diag(chi), "z_dirichlet": eta}
        sampler.sampler.get = lambda same=same: same
    return found


@against("peft 0.21", "monteclora")
def test_training_beside_peft() -> None:
    """With the same draws the same outputs, gradients of all tensors, and as many parameters."""
    compared = both(training=True)
    count = sum(p.numel() for p in compared.tuner.model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in compared.injection.parameters())
    assert count == RANK * (12 + 7 + 7 + 9) + 2 * (RANK + SAMPLES)
    x = torch.randn(2, 3, 12).double()
    ours, theirs = compared.assert_same_outputs(lambda model: model(x))
    assert difference(ours, theirs) <= FLOAT32
    compared.assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("entropy", [False, True])
@against("peft 0.21", "monteclora")
def test_losses_beside_peft(entropy: bool) -> None:
    """The loss is peft's, and so are its gradients."""
    compared = both(training=True, entropy=entropy, kl=0.1)
    x = torch.randn(2, 3, 12).double()
    compared.ours(x)
    compared.tuner.model(x)
    ours, theirs = compared.injection.losses(), compared.tuner._get_monteclora_loss()
    assert abs(theirs) > 0.1 and difference(ours, theirs) <= FLOAT32
    for loss in (ours, theirs):
        loss.backward()
    for pair in compared.pairs:
        if pair.name[-1] in "tp":
            assert pair.theirs.grad.abs().max() > 0
            assert difference(pair.ours.grad, pair.theirs.grad) <= 10 * FLOAT32, pair.name


@against("peft 0.21", "monteclora")
def test_evaluation_beside_peft() -> None:
    compared = both(training=False)
    x = torch.randn(2, 3, 12).double()
    compared.assert_same_outputs(lambda model: model(x))
    compared.assert_same_merged()


def test_what_is_drawn() -> None:
    """A' has the mean A; chi is the diagonal of a Wishart matrix, whose mean is the rank and variance twice that."""
    operator = adapted("linear", "monteclora", **OPTIONS)[2].train()
    many = torch.stack([operator.sample()[0].detach() for _ in range(4000)])
    deviation = many.std(0)
    assert (many.mean(0) - operator.A).abs().max() <= 6 * deviation.max() / 4000**0.5
    assert deviation.min() > 0.1
    chi = torch.stack([operator.drawn()[1] for _ in range(4000)])
    wishart = Wishart(torch.tensor(float(RANK)), torch.eye(RANK)).sample((4000,)).diagonal(dim1=-2, dim2=-1)
    for each in (chi, wishart):
        assert (each.mean(0) - RANK).abs().max() < 0.3 and (each.var(0) - 2 * RANK).abs().max() < 1.5


def test_the_divergences() -> None:
    """Those of the normal distributions are divergences; that of the Dirichlet is but for the sign of one sum."""
    operator = adapted("linear", "monteclora", **OPTIONS, kl=1.0)[2]
    v, w = torch.rand(RANK).double() + 0.5, torch.ones(SAMPLES).double() / SAMPLES
    a, prior = operator.p.detach().exp(), torch.full((SAMPLES,), 0.1).double()
    wrong = 2 * (torch.lgamma(a) - torch.lgamma(prior)).sum()
    dirichlet = kl_divergence(Dirichlet(a), Dirichlet(prior)) + wrong
    normal = SAMPLES * kl_divergence(Normal(0.0, v.sqrt()), Normal(0.0, 1.0)).sum()
    u = (2 * operator.t.detach()).exp()
    wishart = RANK * kl_divergence(Normal(0.0, u.sqrt()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(operator.loss(v, w).detach(), dirichlet + normal + wishart)


def test_sites_share_the_loss() -> None:
    """Twice the same site does not double it: it is a mean."""
    losses = []
    for target in (["0"], ["0", "1"]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        injection = peftcore.apply(model, "monteclora", target=target, kl=1.0)
        with torch.no_grad():
            for operator in injection.operators.values():
                operator.t.fill_(0.5)
                operator.p.fill_(0.5)
        torch.manual_seed(1)
        model.train()(torch.randn(3, 8))
        losses.append(injection.losses())
    assert 0.7 < losses[1] / losses[0] < 1.4
