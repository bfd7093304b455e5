"""AdaLoRA beside peft's: the same outputs, losses, gradients, statistics, choices and merged weights."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn

import peftcore
from peftcore.testing import against
from peftcore.testing.hosts import HOSTS

EXACT = 1e-12
"""Accepted relative difference, in float64."""
RANK, TARGET = 6, 2


@dataclass(frozen=True)
class Schedule:
    total: int
    warmup: int = 0
    final: int = 0
    interval: int = 1


SCHEDULES = [
    pytest.param(Schedule(8), id="plain"),
    pytest.param(Schedule(10, warmup=3, final=2), id="three-phases"),
    pytest.param(Schedule(12, warmup=1, final=3, interval=3), id="every-third"),
]


class Convolutions(nn.Module):
    """Two convolutions and a head, with a loss as transformers' models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 2), stride=2, padding=1)
        self.second = nn.Conv2d(8, 6, 3, dilation=2, padding=2, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.second(torch.tanh(self.first(x))).mean((-2, -1)))
        return peftcore_output(nn.functional.cross_entropy(logits, labels), logits)


def peftcore_output(loss: Tensor, logits: Tensor) -> Any:
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(loss=loss, logits=logits)


def bert() -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    model, inputs = HOSTS["bert"].build()
    return model, {**inputs, "labels": torch.tensor([0, 2])}, ["query", "value", "output.dense"]


def gpt2() -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """Its Conv1D keeps weights transposed."""
    model, inputs = HOSTS["gpt2"].build()
    return model, {**inputs, "labels": inputs["input_ids"]}, ["c_fc", "c_proj"]


def convolutions() -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    return Convolutions(), {"x": torch.randn(2, 3, 9, 9), "labels": torch.tensor([0, 2])}, ["first", "second"]


class Both:
    """One host adapted twice, in float64, with the same random numbers in the adapters."""

    def __init__(self, build: Any, schedule: Schedule) -> None:
        torch.manual_seed(0)
        base, inputs, target = build()
        base.double().eval()
        self.inputs = {key: v.double() if v.is_floating_point() else v for key, v in inputs.items()}
        self.base, self.ours = base, deepcopy(base)
        options = {"warmup": schedule.warmup, "final": schedule.final, "interval": schedule.interval}
        self.injection = peftcore.apply(
            self.ours, "adalora", target=target, rank=RANK, target_rank=TARGET, alpha=4.0, dtype="float64", **options
        )
        config = peft.AdaLoraConfig(
            target_modules=target,
            init_r=RANK,
            target_r=TARGET,
            lora_alpha=4,
            tinit=schedule.warmup,
            tfinal=schedule.final,
            deltaT=schedule.interval,
            total_step=schedule.total,
        )
        self.theirs = AdaLoraModel(deepcopy(base), config, "default").double().eval()
        with torch.no_grad():
            for _, ours, theirs in self.pairs():
                ours.normal_(0, 0.1)
                theirs.copy_(ours.view(theirs.shape))
        trained = {name for name, parameter in self.theirs.named_parameters() if parameter.requires_grad}
        denominators = {name for name in trained if ".ranknum." in name}  # of the scale; peft's optimizers move it
        count = len(self.injection.operators)
        assert len(trained - denominators) == len(list(self.pairs())) == 3 * count > 3
        assert len(denominators) == count

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for path, operator in self.injection.operators.items():
            layer: Any = self.theirs.model.get_submodule(path)
            for name, held in (("A", layer.lora_A), ("B", layer.lora_B), ("E", layer.lora_E)):
                yield f"{path}.{name}", operator.get_parameter(name), held["default"]

    def assert_same(self, what: str) -> None:
        """Values, gradients and statistics of every tensor."""
        allocator = self.theirs.rankallocator
        for name, ours, theirs in self.pairs():
            assert_close(ours, theirs, f"{what}: {name}")
            assert_close(ours.grad, theirs.grad, f"{what}: gradient of {name}")
            path, _, leaf = name.rpartition(".")
            key = f"{path}.lora_{leaf}.default"
            (key,) = [each for each in allocator.exp_avg_ipt if each.endswith(key)] or [None]
            if key is not None:
                operator = self.injection.operators[path]
                assert_close(operator.get_buffer(f"importance_{leaf}"), allocator.exp_avg_ipt[key], f"{what}: {name}")
                assert_close(operator.get_buffer(f"fluctuation_{leaf}"), allocator.exp_avg_unc[key], f"{what}: {name}")


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = (ours.flatten() - theirs.flatten()).abs().max() / theirs.abs().max().clamp(min=1e-3)
    assert error <= EXACT, f"{what}: relative error {error:.1e}"


@pytest.mark.share(3)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("build", [bert, gpt2, convolutions])
@against("peft 0.21", "adalora")
def test_a_whole_training(build: Any, schedule: Schedule) -> None:
    both = Both(build, schedule)
    optimizer = both.injection.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9, total_steps=schedule.total)
    reference = torch.optim.SGD([theirs for _, _, theirs in both.pairs()], lr=0.05, momentum=0.9)
    zeros = []
    plain = both.base(**both.inputs).logits
    for step in range(1, schedule.total + 1):
        output, expected = both.ours(**both.inputs), both.theirs(**both.inputs)
        assert_close(output.logits, expected.logits, f"step {step}: logits")
        assert not torch.allclose(output.logits, plain, atol=1e-6)
        loss = plain_loss(both.ours, output.logits, both.inputs) + both.injection.method.aux_loss(both.injection)
        rounded = torch.finfo(expected.loss.dtype).eps  # the loss of a language model is float32
        torch.testing.assert_close(loss.to(expected.loss.dtype), expected.loss, rtol=4 * rounded, atol=0)
        loss.backward()
        expected.loss.backward()
        optimizer.step()
        reference.step()
        both.theirs.update_and_allocate(step)
        both.assert_same(f"step {step}")
        zeros.append(sum((theirs == 0).sum().item() for name, _, theirs in both.pairs() if name.endswith(".E")))
        optimizer.zero_grad()
        reference.zero_grad()
    sites = len(both.injection.operators)
    assert zeros[-1] == (RANK - TARGET) * sites
    assert zeros[: schedule.warmup] == [0] * schedule.warmup
    ours, theirs = both.ours, both.theirs.merge_and_unload()
    both.injection.bake()
    for name, parameter in ours.named_parameters():
        assert_close(parameter, theirs.get_parameter(name), f"merged {name}")


def plain_loss(model: nn.Module, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Of classes, or of the next token as the host computes it."""
    labels = inputs["labels"]
    if labels.dim() == 1:
        return nn.functional.cross_entropy(logits, labels)
    return model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
