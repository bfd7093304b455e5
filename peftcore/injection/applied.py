"""Describes the parts of a hybrid method, selects the tensors of an adapter that train, and copies values into its
tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftcore.contract.installed_methods import AppliedMethod
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import NoWeights, PluginError
from peftcore.injection.freezing import freeze
from peftcore.registry.plugins import registry
from peftcore.utils.journal import Journal

if TYPE_CHECKING:
    from peftcore.injection.injection import Injection


class HybridPart(AppliedMethod):
    """One method of an installed hybrid (an injection of several methods). Its sites and operators can be read, and its
    parameters trained or frozen. Activating, merging, saving and removing is possible only for the `whole`
    injection."""

    def __init__(self, name: str, surgeon: Surgeon, whole: Injection) -> None:
        super().__init__(name, surgeon)
        self._whole = whole

    @property
    def whole(self) -> Injection:
        return self._whole

    @property
    def parts(self) -> dict[str, HybridPart]:
        return parts_of(self._surgeon, self._whole)

    def __repr__(self) -> str:
        return f"HybridPart({self.name!r} of {self.whole.name!r}: {self.method.name}, {len(self.grafts)} sites)"


def parts_of(surgeon: Surgeon, whole: Injection) -> dict[str, HybridPart]:
    """Returns the parts of a hybrid by name. `surgeon` is the object that recorded its operators."""
    return {name: HybridPart(name, each, whole) for name, each in surgeon.parts.items()}


class Planned(HybridPart):
    """One method of a plan: its operators are recorded but not installed. A method reads it to choose the parameters
    that would train. Parts of a planned hybrid are `Planned` objects too."""

    def __init__(self, surgeon: Surgeon, name: str = "planned") -> None:
        AppliedMethod.__init__(self, name, surgeon)

    @property
    def whole(self) -> Injection:
        raise PluginError(
            f"{self.method.name}: `trainable` reads the injection, which does not exist in a plan: choose by "
            "`operators`, `shared`, `parts` and `config`"
        )

    @property
    def parts(self) -> dict[str, HybridPart]:
        return {name: Planned(surgeon, name) for name, surgeon in self._surgeon.parts.items()}

    def __repr__(self) -> str:
        return f"Planned({self.method.name}, {len(self.grafts)} sites)"


def choose_trained(journal: Journal, applied: AppliedMethod) -> None:
    """Set which parameters of an adapter train: those that the method selects, and those of modules that the user named
    in ``train``. All other parameters of the adapter are frozen.
    """
    freeze(journal, applied.parameters())
    hook = registry().hook
    hook.peftcore_select(model=applied.model, method=applied.method, config=applied.config, injection=applied)
    for graft in applied.grafts:
        if not graft.by_method:  # modules named in `train` train, whatever the method selects
            graft.operator.requires_grad_(True)


@torch.no_grad()
def fill(applied: AppliedMethod, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of an adapter, by their names in `state_dict`. Tensors without a value in `tensors`
    do not change.
    """
    for path, module in applied.modules():
        for key, value in module.state_dict(keep_vars=True).items():
            saved = tensors.get(f"{path}.{key}")
            if saved is not None and value.is_meta:  # it was to start from the host's weight
                _put(module, key, saved.to(value.dtype))
            elif saved is not None:
                value.data.copy_(saved)


def _put(module: nn.Module, key: str, value: Tensor) -> None:
    """Replace a tensor on the meta device by a value."""
    below, _, name = key.rpartition(".")
    owner = module.get_submodule(below)
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[name] = value


def check_filled(applied: AppliedMethod) -> None:
    """Check that all tensors of an adapter have values.

    Raises:
        NoWeights: some tensors start from the host's weights, but the host is on the meta device.
    """
    held = ((path, name, each) for path, module in applied.modules()
            for name, each in (*module.named_parameters(), *module.named_buffers()))  # fmt: skip
    lacking = [f"{path}.{name}" for path, name, each in held if each.is_meta]
    if lacking:
        what = (
            f"{applied.method.name} computes start values from its weights: {', '.join(lacking[:4])}. Load the model "
            "with weights first"
        )
        raise NoWeights(f"the host is on the meta device, and {what}")
