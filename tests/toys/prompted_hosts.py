"""Hosts of the kit for soft prompts that look at the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftcore.testing.hosts import HOSTS


def host(name: str) -> tuple[Any, dict[str, Tensor]]:
    """Build a frozen host in float64, and its inputs."""
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    return model.double().eval().requires_grad_(False), inputs


def outputs(name: str, model: Any, **inputs: Tensor) -> Tensor:
    """Return the states of each token in BERT, which here answers for the whole text; logits elsewhere."""
    found: Tensor = model.bert(**inputs)[0] if name == "bert" else model(**inputs).logits
    return found
