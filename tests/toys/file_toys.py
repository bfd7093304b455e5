"""An adapter to save, and the bytes of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftcore
from peftcore.testing import HOSTS


def host(name: str = "mlp") -> tuple[nn.Module, dict[str, Any]]:
    """A host of the kit, always the same."""
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    return model.eval(), inputs


def adapted(value: float = 0.1, **wishes: Any) -> peftcore.Injection:
    """An adapter of LoRA on the smallest host, all of its numbers the same."""
    injection = peftcore.apply(host()[0], "lora", **{"target": ["first", "second"], "rank": 64, **wishes})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.fill_(value)
    return injection


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What stands in a folder."""
    return {each.name: each.read_bytes() for each in sorted(folder.iterdir())}
