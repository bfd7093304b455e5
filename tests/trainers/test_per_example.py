"""Gradients of single examples are those of a loop over the rows, in float64; Opacus's optimizer takes them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_hosts import host, inputs

import peftcore
from peftcore.errors import TrainingError
from peftcore.testing.kit import fill
from peftcore.training import PerExample

METHODS = ("lora", "dora", "ia3", "oft", "vera", "houlsby_adapter", "bitfit", "ln_tuning", "prefix_tuning", "boft")
OPTIONS: dict[str, dict[str, Any]] = {"bitfit": {"add_missing_bias": True}}


class Reads(nn.Module):
    """An embedding, a convolution, a norm and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.near = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.near(x.mT).mT
        return self.down(torch.tanh(self.up(self.norm(x)))).mean(1)


def reads(method: str = "lora", **options: Any) -> tuple[nn.Module, peftcore.Injection, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Reads().train()
    injection = peftcore.apply(model, method, seed=0, **options)
    fill(injection)
    model.double()
    return model, injection, torch.randint(11, (5, 4)), torch.arange(5) % 3


def by_loop(model: nn.Module, loss: Any, rows: int) -> dict[str, Tensor]:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    each = [torch.autograd.grad(loss(row), [*trained.values()], materialize_grads=True) for row in range(rows)]
    return {name: torch.stack(values) for name, *values in zip(trained, *each, strict=True)}


def compare(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        parameter: Any = model.get_parameter(name)
        torch.testing.assert_close(parameter.grad_sample, value, rtol=1e-9, atol=1e-11)
        assert parameter.grad is None
    assert max(value.abs().max() for value in expected.values()) > 1e-4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "ia3", "bitfit"])
def test_layers_of_all_kinds(method: str, reduction: Any) -> None:
    options = {} if method == "bitfit" else {"target": ["words", "near", "up", "down"]}
    if method == "ia3":
        options = {"target": ["near", "up", "down"]}
    model, _, ids, labels = reads(method, **options)
    expected = by_loop(model, lambda row: nn.functional.cross_entropy(model(ids[[row]]), labels[[row]]), 5)
    output = PerExample(model, reduction).train()(ids)
    torch.testing.assert_close(output, model(ids))
    nn.functional.cross_entropy(output, labels, reduction=reduction).backward()
    compare(model, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_language_model(method: str) -> None:
    model = host("llama").train()
    model.set_attn_implementation("eager")
    injection = peftcore.apply(model, method, seed=0, **OPTIONS.get(method, {}))
    fill(injection)
    model.double()
    given = inputs("llama")
    rows = len(given["input_ids"])
    assert rows > 1

    def loss(row: int) -> Tensor:
        alone = {name: value[[row]] for name, value in given.items()}
        return model(**alone).logits.square().mean()

    expected = by_loop(model, loss, rows)
    PerExample(model).train()(**given).logits.square().mean().backward()
    compare(model, expected)


def test_several_batches_before_a_step_and_empty_ones() -> None:
    model, injection, ids, labels = reads()
    private = PerExample(model).train()
    for rows in (slice(0, 3), slice(3, 5), slice(0, 0)):
        nn.functional.cross_entropy(private(ids[rows]), labels[rows], reduction="sum").backward()
    for parameter in injection.parameters():
        kept: Any = parameter
        assert [len(each) for each in kept.grad_sample] == [3, 2, 0]


def test_evaluation_and_no_grad_run_the_model() -> None:
    model, injection, ids, _ = reads()
    private = PerExample(model).train()
    with torch.no_grad():
        assert torch.equal(private(ids), model(ids))
    private.eval()
    private(ids).sum().backward()
    assert all(parameter.grad is not None for parameter in injection.parameters())


def test_what_is_refused() -> None:
    model, injection, ids, _ = reads()
    private = PerExample(model).train()
    with pytest.raises(TrainingError, match="two forwards"):
        (private(ids) + private(ids)).sum().backward()
    assert all(getattr(each, "grad_sample", None) is None for each in injection.parameters())
    with pytest.raises(TrainingError, match="neither 'mean' nor 'sum'"):
        PerExample(model, "none")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="rows"):
        PerExample(nn.Bilinear(2, 2, 2))(torch.ones(2, 2), torch.ones(3, 2))
    with pytest.raises(TrainingError, match="without the batch"):
        PerExample(nn.Flatten(0))(torch.ones(2, 3))
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(TrainingError, match="batch norm"):
        PerExample(normed)(torch.ones(3, 4))
    adalora, _, ids, _ = reads("adalora", target=["up", "down"])
    with pytest.raises(TrainingError, match="adds its own loss"):
        PerExample(adalora)(ids)
