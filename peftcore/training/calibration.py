"""Runs the two steps in which a method reads the user's data before training. In one it chooses options for each site,
in the other it initializes values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from peftcore.contract.batches import Batches, Data
from peftcore.errors import PluginError
from peftcore.utils.journal import Journal

if TYPE_CHECKING:
    from peftcore.contract.config import MethodConfig
    from peftcore.contract.installed_methods import AppliedMethod
    from peftcore.contract.method import Method
    from peftcore.targets.sites import Site

C = TypeVar("C", bound="MethodConfig")


def calibrate(injection: AppliedMethod, data: Data, base: Iterable[nn.Module], acting: Iterable[AppliedMethod]) -> None:
    """Let a method initialize its values from the data. In a hybrid, each method that needs data does this. Gradients,
    training modes, `requires_grad` and the random generator are restored afterwards.

    Args:
        injection: the adapter.
        data: the user's data.
        base: the host's own modules.
        acting: the active adapters. Their parameters get gradients too, and these are also restored.

    Raises:
        CalibrationError: a method cannot use the data.
        PluginError: a method changed the shape of a tensor, so that its file could not be loaded without the data.
    """
    model = injection.model
    planned = {key: tensor.shape for key, tensor in injection.state_dict().items()}
    modules = [*base, *(inner for _, module in injection.modules() for inner in module.modules())]
    others = [parameter for each in acting for parameter in each.parameters()]
    with _as_it_was(modules, others):
        for each in injection.family():
            if each.method.looks_at_data(each.config):
                batches = Batches(model, data, f"{each.method.name} looks at the data")
                each.method.calibrate(model, batches, each.config, each)
    if other := [key for key, tensor in injection.state_dict().items() if planned.get(key) != tensor.shape]:
        raise PluginError(
            f"{injection.method.name}: calibrate changed the shape of {other[0]}, so its file could not be loaded: "
            "change only values, and set sizes by options"
        )


def find_structure(
    method: Method, model: nn.Module, data: Data, config: C, sites: Sequence[Site]
) -> tuple[C, frozenset[str]]:
    """Let the method choose options for each site from the data, before operators are built. Gradients, training modes,
    `requires_grad` and the random generator are restored afterwards.

    Returns:
        The options, with overrides for single sites, and the paths of sites that the method does not adapt.

    Raises:
        CalibrationError: the method cannot use the data.
        ConfigError: an option that the method chose is invalid.
        PluginError: the method returned options for a path that is not a site.
    """
    with _as_it_was([*model.modules()], []):
        found = method.structure(model, Batches(model, data, f"{method.name} looks at the data"), config, sites)
    if unknown := found.keys() - {site.path for site in sites}:
        raise PluginError(
            f"{method.name}: structure returned options for {sorted(unknown)[0]!r}, which is not a site of the method"
        )
    own = {path: dict(options) for path, options in found.items() if options and path not in config.overrides}
    left_out = frozenset(path for path, options in found.items() if options is None)
    return config.replace(overrides={**config.overrides, **own}), left_out


@contextmanager
def _as_it_was(modules: Iterable[nn.Module], others: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager that restores the training modes of modules, the gradients and `requires_grad` of their
    parameters, and the state of the random generator."""
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
    """Returns the indices of the CUDA devices of the parameters, whose random generators have to be restored."""
    return sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
