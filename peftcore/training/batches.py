"""The user's data, as a method sees it before training: batches with an output and a loss, behind a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from peftcore.errors import CalibrationError, PluginError
from peftcore.forward.context.context import bound
from peftcore.utils.journal import Journal
from peftcore.utils.progress import through

if TYPE_CHECKING:
    from peftcore.contract.config import MethodConfig
    from peftcore.contract.method import Method
    from peftcore.injection.injection import Injection
    from peftcore.targets.sites import Site

C = TypeVar("C", bound="MethodConfig")


@dataclass(frozen=True)
class Labelled:
    """A batch together with labels, for models that do not take labels as an input.

    Example:
        data = [peftcore.Labelled({"pixel_values": images}, labels=torch.tensor([0, 2]))]
    """

    batch: Mapping[str, Any] | tuple[Any, ...] | list[Any] | Callable[[nn.Module], Any]
    """The batch, as data has it without labels."""
    labels: Tensor
    """The labels of the batch."""


Data = Iterable[Mapping[str, Any] | tuple[Any, ...] | list[Any] | Callable[[nn.Module], Any] | Labelled]
"""Batches: mappings are called as ``model(**batch)``, tuples and lists as ``model(*batch)``; a function of the model
runs it itself, and returns the loss where the model does not. Each of them may be `Labelled`."""


class Batch:
    """One batch of the user's data; tensors in it go to the model's device."""

    def __init__(self, model: nn.Module, content: Any) -> None:
        labelled = isinstance(content, Labelled)
        self._model, self._content = model, content.batch if labelled else content
        self._labels: Tensor | None = content.labels if labelled else None
        self._called: Mapping[str, Any] | None = None  # with what a function called the model

    @property
    def beside(self) -> Tensor | None:
        """The labels of a `Labelled` batch; None for other batches. `labels` also finds those among the model's inputs.
        For methods that need extra information for some batches only.
        """
        return self._labels

    def output(self) -> Any:
        """Returns the model's output for the batch.

        Raises:
            CalibrationError: a model cannot be called with the batch.
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
        """Run a function of the model, and note the arguments of its first call."""
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
        """Returns the output's loss, or the output itself where it is a scalar: of shape ``[]``, with its graph.

        Raises:
            CalibrationError: the output lacks a loss.
        """
        output = self.output()
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise CalibrationError(
                f"the model's {type(output).__name__} has no loss: give batches with labels, or functions of the model "
                "that return the loss"
            )
        return loss.view(())

    def inputs(self) -> Mapping[str, Any]:
        """Returns what the model is given: its arguments by the names of its forward, on its device. Where the batch is
        a function, those of its first call of the model; it runs once for that, unless it did.

        Raises:
            CalibrationError: the function does not call the model, or a model cannot be called with the batch.
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
            raise CalibrationError("a batch is a function that does not call the model, so nobody knows its inputs")
        return self._called

    def labels(self) -> Tensor:
        """Returns the labels of the batch, on the model's device: those of a `Labelled` batch, or the model's input
        ``labels``.

        Raises:
            CalibrationError: the batch lacks labels.
        """
        labels = self.inputs().get("labels") if self._labels is None else self._labels
        if not isinstance(labels, Tensor):
            raise CalibrationError(
                'a batch has no labels: give mappings with "labels", or peftcore.Labelled(batch, labels) where the '
                "model takes none"
            )
        moved: Tensor = _to(_device(self._model), labels)
        return moved


class Batches:
    """The batches in their order, iterable as often as the user's data. Iterating shows a progress bar, and raises
    CalibrationError if the data is empty.
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


def calibrate(injection: Injection, data: Data) -> None:
    """Let the method (of a hybrid: those of its methods that ask for it) look at the data; afterwards gradients,
    modes, flags and the random generator are as before.

    Raises:
        CalibrationError: the data is of no use to a method.
        PluginError: a method changed shapes: a file of it would load nowhere, since what is loaded looks at no data.
    """
    model = injection.model
    planned = {key: tensor.shape for key, tensor in injection.state_dict().items()}
    modules = [*injection.base_modules(), *(inner for _, module in injection.modules() for inner in module.modules())]
    acting = [injection.state.injections[name] for name in injection.state.current()]
    others = [parameter for each in acting for parameter in each.parameters()]  # a loss reaches these too
    with _as_it_was(modules, others):
        for each in injection.family():
            if each.method.looks_at_data(each.config):
                batches = Batches(model, data, f"{each.method.name} looks at the data")
                each.method.calibrate(model, batches, each.config, each)
    if other := [key for key, tensor in injection.state_dict().items() if planned.get(key) != tensor.shape]:
        raise PluginError(
            f"{injection.method.name}: calibrate changed the shape of {other[0]}, so a file of it would load nowhere: "
            "change values alone, and say sizes in the options"
        )


def find_structure(
    method: Method, model: nn.Module, data: Data, config: C, sites: Sequence[Site]
) -> tuple[C, frozenset[str]]:
    """Let the method look at the data before any operator is built; afterwards gradients, modes, flags and the random
    generator are as before.

    Returns:
        The options, with those that it found for single sites, and the paths of the sites that it leaves out.

    Raises:
        CalibrationError: the data is of no use to the method.
        ConfigError: an option that it found breaks a rule.
        PluginError: it found something for another place than a site.
    """
    with _as_it_was([*model.modules()], []):
        found = method.structure(model, Batches(model, data, f"{method.name} looks at the data"), config, sites)
    if unknown := found.keys() - {site.path for site in sites}:
        raise PluginError(f"{method.name}: structure found options for {sorted(unknown)[0]!r}, no site of the method")
    own = {path: dict(options) for path, options in found.items() if options and path not in config.overrides}
    left_out = frozenset(path for path, options in found.items() if options is None)
    return config.replace(overrides={**config.overrides, **own}), left_out


@contextmanager
def _as_it_was(modules: Iterable[nn.Module], others: Iterable[nn.Parameter]) -> Iterator[None]:
    """Leaves the modes of modules, gradients and flags of their parameters, and the random generator as they were."""
    held = list(dict.fromkeys(modules))
    parameters = dict.fromkeys(parameter for module in held for parameter in module.parameters(recurse=False))
    with Journal(temporary=True) as journal, torch.random.fork_rng(_generators(parameters)):
        for module in held:
            journal.set(module, "training", module.training)
        for parameter in parameters:
            journal.set(parameter, "requires_grad", parameter.requires_grad)
        for parameter in dict.fromkeys([*parameters, *others]):
            journal.set(parameter, "grad", None)
        yield


def _generators(parameters: Iterable[nn.Parameter]) -> list[int]:
    """Returns the CUDA devices whose generators dropout may advance (the CPU's is always restored)."""
    return sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})


def _device(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters()), None)


def _to(device: torch.device | None, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if device is None or device.type == "meta" else value.to(device)
    if isinstance(value, dict):
        return {key: _to(device, each) for key, each in value.items()}
    return [_to(device, each) for each in value] if isinstance(value, list) else value
