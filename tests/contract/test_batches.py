"""What a batch of the user's data says to a method: its inputs by name, its labels, its loss."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_toys import batch, method, toy

import peftcore
from peftcore import Injection
from peftcore.author import Batches, Method
from peftcore.errors import CalibrationError


def content(data: list[Any], model: nn.Module | None = None) -> list[tuple[dict[str, Any], Tensor | str]]:
    """The inputs of each batch, and its labels or why there are none, as a method sees them."""
    found: list[tuple[dict[str, Any], Tensor | str]] = []

    def look(self: Method, model: nn.Module, data: Batches, config: Any, injection: Injection) -> None:
        for each in data:
            try:
                labels: Tensor | str = each.labels()
            except CalibrationError as error:
                labels = str(error)
            found.append((dict(each.inputs()), labels))
        next(iter(injection.operators.values())).get_buffer("found").fill_(1)

    peftcore.apply(toy() if model is None else model, method("reads", {"needs_data": True}, calibrate=look), data=data)
    return found


def test_a_batch_says_its_inputs_by_name_and_its_labels() -> None:
    one = batch(1)

    def twice(model: nn.Module) -> Any:
        model(batch(2)["x"])
        return model(**batch(3))["loss"]

    def once(model: nn.Module) -> Any:
        return model(one["x"], labels=one["labels"])["loss"]

    for given in (one, tuple(one.values()), list(one.values()), once):
        [(inputs, labels)] = content([given])
        assert inputs.keys() == {"x", "labels"} and isinstance(labels, Tensor)
        assert torch.equal(inputs["x"], one["x"]) and torch.equal(labels, one["labels"])
    [(inputs, labels)] = content([twice])  # those of the first call
    assert inputs.keys() == {"x"} and torch.equal(inputs["x"], batch(2)["x"])
    assert isinstance(labels, str) and "peftcore.Labelled" in labels


def test_labels_may_stand_beside_a_batch_that_the_model_gets_without_them() -> None:
    x, labels = batch()["x"], torch.tensor([2, 0, 1, 2])
    for given in ({"x": x}, (x,), [x], lambda model: model(x).sum()):
        [(inputs, found)] = content([peftcore.Labelled(given, labels)])
        assert inputs.keys() == {"x"} and isinstance(found, Tensor) and torch.equal(found, labels)
    [(inputs, found)] = content([peftcore.Labelled(batch(), labels)])  # these count, and the model gets its own
    assert isinstance(found, Tensor) and torch.equal(found, labels) and not torch.equal(inputs["labels"], labels)


def test_what_stands_beside_a_batch_is_not_what_the_model_is_given() -> None:
    labels = torch.tensor([2, 0, 1, 2])
    seen: list[Tensor | None] = []

    def look(self: Method, model: nn.Module, data: Batches, config: Any, injection: Injection) -> None:
        seen.extend(each.beside for each in data)
        next(iter(injection.operators.values())).get_buffer("found").fill_(1)

    peftcore.apply(
        toy(), method("reads", {"needs_data": True}, calibrate=look), data=[batch(), peftcore.Labelled(batch(), labels)]
    )
    assert seen[0] is None and seen[1] is labels


def test_a_function_runs_once_for_its_output_and_its_inputs() -> None:
    calls: list[int] = []

    def run(model: nn.Module) -> Any:
        calls.append(1)
        return model(**batch())["loss"]

    model = toy()
    hooks = len(model._forward_pre_hooks)
    each = peftcore.Batch(model, run)
    assert each.loss().requires_grad and each.inputs().keys() == {"x", "labels"} and len(calls) == 1
    fresh = peftcore.Batch(model, run)
    assert torch.equal(fresh.labels(), batch()["labels"]) and len(calls) == 2
    assert len(model._forward_pre_hooks) == hooks
    with pytest.raises(CalibrationError, match="does not call the model"):
        peftcore.Batch(model, lambda model: model.up(batch()["x"]).sum()).inputs()
