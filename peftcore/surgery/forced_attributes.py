"""Attributes that are forced on some modules while a host is adapted, because these modules would otherwise bypass
adapters or change a frozen base.

The forward runs on a view, an object with the module's tensors and the forced attributes, so the module itself does not
change. The attributes for torch's own modules are listed here. Plugins add others with the hook
`peftcore_forced_attributes`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from peftcore.contract.hookspecs import ForcedAttributes
from peftcore.layers.layer import plain_class
from peftcore.registry.plugins import registry

FORCED_ATTRIBUTES: Mapping[type[nn.Module], ForcedAttributes] = {
    # Running statistics of a frozen base stay.
    _NormBase: ForcedAttributes(
        {"training": False}, wanted=lambda module: getattr(module, "running_mean", None) is not None
    ),
    # No sparse gradient passes through what makes an effective table.
    nn.Embedding: ForcedAttributes({"sparse": False}, always=False, wanted=lambda module: bool(module.sparse)),
    # The nested-tensor path works on the fused layer path only,
    nn.TransformerEncoder: ForcedAttributes({"use_nested_tensor": False}, always=False),
    # and the fused path reads the children's weights itself.
    nn.TransformerEncoderLayer: ForcedAttributes({"activation_relu_or_gelu": 0}, always=False),
}


@functools.cache
def _of_class(cls: Any) -> ForcedAttributes | None:
    forced: ForcedAttributes | None = registry().hook.peftcore_forced_attributes(cls=cls)
    return forced


def forced_attributes_of(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, ForcedAttributes]]:
    """Yields the modules that need forced attributes while the host is adapted, each with these attributes."""
    known: dict[Any, ForcedAttributes | None] = {}
    for module in modules:
        cls: Any = type(module)
        if cls not in known:
            plain: Any = plain_class(module)
            known[cls] = _of_class(plain)
        forced = known[cls]
        if forced is not None and forced.wanted(module):
            yield module, forced
