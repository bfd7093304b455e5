"""What the layer of QA-LoRA's authors adds to outputs, on tensors of sines, on peft 0.4:
``python -m peftcore.testing.freeze qa_lora.py CHECKOUT``."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "yuhuixu1993/qa-lora", "91604c7", "peft_utils.py")
VERSIONS = ("torch", "peft")


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


@torch.no_grad()
def numbers(checkout: Path) -> list[list[float]]:
    """Returns what is added to two outputs of width 5, in groups of 4 of 12 inputs."""
    sys.modules["auto_gptq.modeling._base"] = MagicMock()  # it stands inside of that package, beside its models
    spec = importlib.util.spec_from_file_location("auto_gptq.utils.peft_utils", checkout / SOURCE.script)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.group_size = 4
    host, x = nn.Linear(12, 5), 5 * wave(2, 12, step=2.1)
    layer = module.GPTQLoraLinear("default", host, r=3, lora_alpha=5).double()
    layer.lora_A.default.weight.copy_(wave(3, 3, step=1.1))
    layer.lora_B.default.weight.copy_(wave(5, 3, step=1.7))
    host.weight.zero_()
    host.bias.zero_()
    found: list[list[float]] = layer(x).tolist()
    return found
