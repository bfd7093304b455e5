"""Presets: named sets of a method's options, targets and additional modules to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A named set of a method's options, such as rsLoRA. `apply` accepts the name of a preset in place of the name of a
    method.

    Options of the user override options of the preset. The resulting adapter, and its file, are those of the method.
    """

    method: str
    """The name of the method."""
    paper: str
    """The arXiv number of the paper that introduced the name, or another reference."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method that differ from its defaults."""
    target: str | tuple[str, ...] | None = None
    """Default targets; None for the default targets of the method."""
    train: tuple[str, ...] = ()
    """Additional modules to train, as in the argument of `apply`."""
    claims: Mapping[str, Any] = field(default_factory=dict)
    """Tags that differ from the method's tags: ``{"identity_at_init": False}``."""
    workflow: str = ""
    """Instructions for the user, if one call of `apply` is not enough; otherwise empty."""
    note: str = ""
    """One sentence about the parts of the paper that the preset covers and leaves out; empty if it covers the whole
    method."""

    def __str__(self) -> str:
        said = [f"{name}={value!r}" for name, value in self.options.items()]
        said += [f"target={self.target!r}"] if self.target is not None else []
        said += [f"train={list(self.train)}"] if self.train else []
        return self.workflow or f"{self.method}({', '.join(said)})"
