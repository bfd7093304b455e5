"""How modules that would go behind the back of grafts, or move a frozen base, are held while a host is adapted.

A stance is a set of attributes that the module's view has: no flag is set on the module itself. Those of torch's own
modules stand here; plugins add theirs with the hook `peftcore_stance`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from peftcore.layers.layer import plain_class
from peftcore.registry.plugins import registry


@dataclass(frozen=True)
class Stance:
    """How modules of one class are held."""

    attributes: Mapping[str, Any]
    """What the view has in place of the module's own attributes."""
    always: bool = True
    """Held while any injection is on the host; otherwise only while one acts inside the module."""
    wanted: Callable[[nn.Module], bool] = lambda module: True
    """Whether this very module needs it."""
    ready: Callable[[nn.Module], None] = lambda module: None
    """Brings a module back into the state that the stance keeps it in; its weights stay what they are."""


STANCES: Mapping[type[nn.Module], Stance] = {
    # Running statistics of a frozen base stay.
    _NormBase: Stance({"training": False}, wanted=lambda module: getattr(module, "running_mean", None) is not None),
    # The nested-tensor path works on the fused layer path only,
    nn.TransformerEncoder: Stance({"use_nested_tensor": False}, always=False),
    # and the fused path reads the children's weights itself.
    nn.TransformerEncoderLayer: Stance({"activation_relu_or_gelu": 0}, always=False),
}


@functools.cache
def _of_class(cls: Any) -> Stance | None:
    stance: Stance | None = registry().hook.peftcore_stance(cls=cls)
    return stance


def stances_of(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Stance]]:
    """How modules must be held while the host is adapted: those that must be."""
    known: dict[Any, Stance | None] = {}
    for module in modules:
        cls: Any = type(module)
        if cls not in known:
            plain: Any = plain_class(module)
            known[cls] = _of_class(plain)
        stance = known[cls]
        if stance is not None and stance.wanted(module):
            yield module, stance
