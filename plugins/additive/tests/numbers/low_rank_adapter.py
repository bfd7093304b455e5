"""What OpenDelta's low-rank adapter makes of a token, on tensors of sines:
``python -m peftcore.testing.freeze low_rank_adapter.py CHECKOUT``.

CHECKOUT is a folder that ``pip install --target CHECKOUT --no-deps opendelta==0.3.2`` filled; its code is
that of the commit below.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("OpenDelta 0.3.2", "thunlp/OpenDelta", "20e426f", "opendelta/delta_models/low_rank_adapter.py")
VERSIONS = ("torch", "transformers")
ABSENT = ("DeltaCenter", "transformers.deepspeed", "web", "opendelta.delta_models.prefix")
"""What its package imports, and this adapter does not need."""


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the output, the token itself added, and the gradients of all tensors, flat, by name."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    adapter = module.LowRankAdapter(reduction_factor=2)
    adapter.instantiate(torch.empty(1, 8, dtype=torch.float64))
    own = [(key, p) for key, p in adapter.named_parameters()]
    with torch.no_grad():
        for index, (_, tensor) in enumerate(own):
            tensor.copy_(wave(tensor, 1 + 0.3 * index))
    x = wave(torch.empty(2, 8), 0.4).requires_grad_()
    y = adapter.post_forward(x)
    (y.square() * wave(y, 0.3)).sum().backward()
    return {
        "output": y.flatten().tolist(),
        "input": x.grad.flatten().tolist(),
        "gradients": {key: p.grad.flatten().tolist() for key, p in own},
    }
