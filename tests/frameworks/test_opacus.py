"""Opacus clips what `PerExample` leaves: its own gradients where it has them, and those of a loop where it has none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import peftcore
from peftcore.testing.kit import fill
from peftcore.training import PerExample

opacus = pytest.importorskip("opacus")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 2, 8, generator=generator, dtype=torch.float64), torch.arange(6) % 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_an_adapter_they_are_those_of_opacus(reduction: Any) -> None:
    x, labels = data()
    found = []
    for model in (opacus.GradSampleModule(net(), loss_reduction=reduction), PerExample(net(), reduction)):
        nn.functional.cross_entropy(model.train()(x), labels, reduction=reduction).backward()
        found.append([parameter.grad_sample for parameter in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Secure RNG")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_step_without_noise_is_that_of_clipped_gradients(method: str) -> None:
    clip, rate = 1.65, 0.3
    x, labels = data()
    model = net()
    injection = peftcore.apply(model, method, target=["0", "4"], seed=0)
    fill(injection)
    model.double().train()
    before = [parameter.detach().clone() for parameter in injection.parameters()]
    total = [torch.zeros_like(each) for each in before]
    clipped = 0
    for row in range(6):
        loss = nn.functional.cross_entropy(model(x[[row]]), labels[[row]])
        gradients = torch.autograd.grad(loss, [*injection.parameters()])
        norm = torch.stack([each.norm() for each in gradients]).norm()
        clipped += int(norm > clip)
        for into, each in zip(total, gradients, strict=True):
            into += each * (clip / (norm + 1e-6)).clamp(max=1)  # as Opacus divides
    assert 0 < clipped < 6
    private, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=PerExample(model),
        optimizer=torch.optim.SGD(injection.parameters(), lr=rate),
        data_loader=DataLoader(TensorDataset(x, labels), batch_size=6),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        poisson_sampling=False,
        grad_sample_mode="no_op",
    )
    nn.functional.cross_entropy(private(x), labels).backward()
    optimizer.step()
    for parameter, old, summed in zip(injection.parameters(), before, total, strict=True):
        torch.testing.assert_close(parameter.detach(), old - rate * summed / 6, rtol=1e-9, atol=1e-12)
