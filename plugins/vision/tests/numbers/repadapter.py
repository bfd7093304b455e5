"""What a matrix behind the authors' RepAdapter gives, and what they merge into it, on tensors of sines:
``python -m peftcore.testing.freeze repadapter.py CHECKOUT``."""

import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "luogen1996/RepAdapter", "360992f", "repadapter.py")
VERSIONS = ("torch", "timm")
STEPS = {"conv_A.weight": 1.1, "conv_A.bias": 1.3, "conv_B.weight": 1.7, "conv_B.bias": 1.9, "weight": 2.3, "bias": 2.9}


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the output for two tokens of width 6, ``[2, 5]``; then the weight and the bias after merging."""
    module = load(checkout / SOURCE.script)
    block: Any = timm.models.vision_transformer.Block(dim=6, num_heads=1)
    block.adapter_attn, block.s = module.RepAdapter(in_features=6, hidden_dim=4, groups=2, scale=0.7), 0.7
    block.attn.qkv = nn.Linear(6, 5)
    block.double().eval()
    for part in (block.adapter_attn, block.attn.qkv):
        for name, parameter in part.named_parameters():
            parameter.copy_(wave(*parameter.shape, step=STEPS[name]))
    output = block.attn.qkv(block.adapter_attn(5 * wave(1, 2, 6, step=2.1)))[0]
    torch.set_default_dtype(torch.float64)  # the identity that is merged along has it
    module.set_RepWeight(nn.Sequential(block), "repattn")
    torch.set_default_dtype(torch.float32)
    qkv = block.attn.qkv
    return {"output": output.tolist(), "weight": qkv.weight.tolist(), "bias": qkv.bias.tolist()}
