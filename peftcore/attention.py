"""Edits of what happens inside attention: keys, values and queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peftcore.mounts import Edits
    from peftcore.targets import Site


def check(site: Site) -> None:
    """Verify that the attention at a site can be edited."""


def attributes(module: nn.Module, edits: Edits) -> Mapping[str, Any]:
    """What the view of an attention module has instead of the module's own attributes."""
    return {}
