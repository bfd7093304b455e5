"""The user's data, as a method gets it before training. Each batch can return the model's output and loss for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import CalibrationError
from peftcore.roles.stacks import bound
from peftcore.utils.progress import through


@dataclass(frozen=True)
class Labelled:
    """A batch together with labels, for models that do not take labels as an input.

    Example:
        data = [peftcore.Labelled({"pixel_values": images}, labels=torch.tensor([0, 2]))]
    """

    batch: Mapping[str, Any] | tuple[Any, ...] | list[Any] | Callable[[nn.Module], Any]
    """The batch without the labels."""
    labels: Tensor
    """The labels of the batch."""


Data = Iterable[Mapping[str, Any] | tuple[Any, ...] | list[Any] | Callable[[nn.Module], Any] | Labelled]
"""The type of the user's data, an iterable of batches. If a batch is a mapping, the model is called as
``model(**batch)``; if it is a tuple or list, as ``model(*batch)``. If it is a function, it gets the model and has to
call it; it returns the model's output, or the loss. Each batch may be wrapped in `Labelled`."""


class Batch:
    """One batch of the user's data; its tensors are moved to the model's device."""

    def __init__(self, model: nn.Module, content: Any) -> None:
        labelled = isinstance(content, Labelled)
        self._model, self._content = model, content.batch if labelled else content
        self._labels: Tensor | None = content.labels if labelled else None
        self._called: Mapping[str, Any] | None = None  # with what a function called the model

    @property
    def beside(self) -> Tensor | None:
        """The labels of a `Labelled` batch; None for other batches. Labels among the model's inputs do not count here;
        `labels` returns both kinds. For methods that need extra information for some batches only.
        """
        return self._labels

    def output(self) -> Any:
        """Returns the model's output for the batch.

        Raises:
            CalibrationError: the model cannot be called with the batch.
        """
        if isinstance(self._content, Mapping):
            return self._model(**_to(_device(self._model), dict(self._content)))
        if isinstance(self._content, tuple | list):
            return self._model(*_to(_device(self._model), list(self._content)))
        if callable(self._content):
            return self._run(self._content)
        raise CalibrationError(
            f"a batch is a {type(self._content).__name__}; batches are mappings (model(**batch)), tuples "
            "(model(*batch)) or functions of the model"
        )

    def _run(self, function: Callable[[nn.Module], Any]) -> Any:
        """Run the user's function on the model, and record the arguments of the function's first call of the model."""
        seen: list[Mapping[str, Any]] = []

        def note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(bound(model, args, kwargs))

        hook = self._model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            output = function(self._model)
        finally:
            hook.remove()
        self._called = seen[0] if seen else None
        return output

    def loss(self) -> Tensor:
        """Returns the loss for the batch, a tensor of shape ``[]`` with its graph. It is the loss in the model's
        output, or the output itself if that is a single value.

        Raises:
            CalibrationError: the output has no loss.
        """
        output = self.output()
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise CalibrationError(
                f"the model's {type(output).__name__} has no loss: pass batches with labels, or functions of the model "
                "that return the loss"
            )
        return loss.view(())

    def inputs(self) -> Mapping[str, Any]:
        """Returns the arguments of the model's forward for this batch, by name, on the model's device. If the batch is
        a function, they are the arguments with which it first calls the model. The function is run once to find them,
        unless `output` has run it already.

        Raises:
            CalibrationError: the function does not call the model, or the model cannot be called with the batch.
        """
        if isinstance(self._content, Mapping):
            inputs: Mapping[str, Any] = _to(_device(self._model), dict(self._content))
            return inputs
        if isinstance(self._content, tuple | list):
            return bound(self._model, tuple(_to(_device(self._model), list(self._content))), {})
        if self._called is None:
            with torch.no_grad():
                self.output()
        if self._called is None:
            raise CalibrationError(
                "a batch is a function that does not call the model, so the model's inputs are unknown: call the "
                "model in it"
            )
        return self._called

    def labels(self) -> Tensor:
        """Returns the labels of the batch, on the model's device: `Labelled.labels`, or for other batches the model's
        input ``labels``.

        Raises:
            CalibrationError: the batch lacks labels.
        """
        labels = self.inputs().get("labels") if self._labels is None else self._labels
        if not isinstance(labels, Tensor):
            raise CalibrationError(
                'a batch has no labels: pass mappings with "labels", or peftcore.Labelled(batch, labels) if the model '
                "takes none"
            )
        moved: Tensor = _to(_device(self._model), labels)
        return moved


class Batches:
    """An iterable of `Batch` over the user's data, in the order of the data. It can be iterated as often as the data
    itself. Iterating shows a progress bar, and raises CalibrationError if the data is empty.
    """

    def __init__(self, model: nn.Module, data: Data, title: str) -> None:
        self._model, self._data, self._title = model, data, title

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for content in through(self._data, self._title):
            count += 1
            yield Batch(self._model, content)
        if not count:
            raise CalibrationError(f"{self._title}: the data has no batches (or was an iterator that is used up)")


def _device(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters()), None)


def _to(device: torch.device | None, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if device is None or device.type == "meta" else value.to(device)
    if isinstance(value, dict):
        return {key: _to(device, each) for key, each in value.items()}
    return [_to(device, each) for each in value] if isinstance(value, list) else value
