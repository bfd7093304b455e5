"""The prompt that the network of residual prompt tuning's authors makes, and its gradients, on tensors of sines:
``python -m peftcore.testing.freeze residual_prompt_tuning.py CHECKOUT``."""

from pathlib import Path

import torch
import transformers
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("others", "arazd/ResidualPrompts", "53087ca", "prompt_tuner2.py")
VERSIONS = ("torch",)


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the rows ``[4, 16]`` flat, and the gradients of the prompt and of each tensor of the network, by number;
    its width is 6."""
    transformers.AdamW = torch.optim.AdamW  # since moved
    module = load(checkout / SOURCE.script, absent=["t5_dataset"])
    network = module.ResMLP(bottleneck_size=6, emb_dimension=16, layer_norm=True).double()
    start = wave((4, 16), 0.41).requires_grad_()
    tensors = [*network.parameters()]
    with torch.no_grad():
        for index, each in enumerate(tensors):
            each.copy_(wave(tuple(each.shape), 0.37 + 0.11 * index))
    rows = network(start)
    (rows * wave((4, 16), 0.23)).sum().backward()
    gradients = {"start": start, **{str(index): each for index, each in enumerate(tensors)}}
    return {"rows": rows.flatten().tolist()} | {key: each.grad.flatten().tolist() for key, each in gradients.items()}
