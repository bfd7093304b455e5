"""Presets: options, targets and modules that train along, under a name of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A name for options of a method, such as rsLoRA; `apply` takes it where it takes the method's.

    What the user says goes before what the preset says. The adapter is one of the method, in its file too.
    """

    method: str
    """The name of the method."""
    paper: str
    """The arXiv number of the paper that gave the name, or another reference."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method that are others than its defaults."""
    target: str | tuple[str, ...] | None = None
    """Default targets; None for the method's."""
    train: tuple[str, ...] = ()
    """Modules that train along, as `apply` has them."""
    claims: Mapping[str, Any] = field(default_factory=dict)
    """Tags that are others than those of the method with its defaults: ``{"identity_at_init": False}``."""
    workflow: str = ""
    """Instructions for the user, where one call of `apply` does not do it; else empty."""
    note: str = ""
    """What of the paper it is and what it leaves out, in a sentence; empty where it is what the paper has."""

    def __str__(self) -> str:
        said = [f"{name}={value!r}" for name, value in self.options.items()]
        said += [f"target={self.target!r}"] if self.target is not None else []
        said += [f"train={list(self.train)}"] if self.train else []
        return self.workflow or f"{self.method}({', '.join(said)})"
