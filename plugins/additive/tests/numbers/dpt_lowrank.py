"""The prompt that DPT's authors make for a batch, and its gradients, on factors of sines:
``python -m peftcore.testing.freeze dpt_lowrank.py CHECKOUT``."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("others", "XYaoooo/DPT", "8f98d1e", "modeling_t5.py")
VERSIONS = ("torch", "transformers")
GONE = ("find_pruneable_heads_and_indices", "prune_linear_layer")


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the rows of two sequences, ``[2, 4, 16]`` flat, the gradients of both factors, and how far the start of
    large factors reaches."""
    for name in GONE:  # since moved; nothing of them is needed
        setattr(transformers.modeling_utils, name, None)
    gone: Any = SimpleNamespace(assert_device_map=None, get_device_map=None)
    sys.modules["transformers.utils.model_parallel_utils"] = gone
    module = load(checkout / SOURCE.script)
    sizes = {"d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 40}
    config = transformers.T5Config(**sizes, add_enc_prompt=True, len_enc_prompt=4, bottle_neck=3)
    stack = module.T5EncoderStack(config).double()
    large = (torch.empty(300, 300), torch.empty(300, 300))
    stack.init_prefix_weights(*(torch.nn.Parameter(each) for each in large))
    with torch.no_grad():
        stack.prefix_first.copy_(wave((4, 3), 0.37))
        stack.prefix_second.copy_(wave((3, 16), 0.29))
    rows = stack.get_prompt_encoder(2, None)
    (rows * wave((2, 4, 16), 0.23)).sum().backward()
    ends = [round(float(end), 2) for each in large for end in (each.min(), each.max())]
    gradients = {"A": stack.prefix_first.grad, "B": stack.prefix_second.grad}
    found = {"rows": rows.flatten().tolist(), "ends": ends}
    return found | {name: each.flatten().tolist() for name, each in gradients.items()}
