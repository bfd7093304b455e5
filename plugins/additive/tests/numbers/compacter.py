"""What the hypercomplex adapter of Compacter's authors makes of a token, on tensors of sines:
``python -m peftcore.testing.freeze compacter.py CHECKOUT``."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "rabeehk/compacter", "e123daa", "seq2seq/hypercomplex/layers.py")
VERSIONS = ("torch", "transformers")


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


def adapter(module: Any, activation: nn.Module, **options: Any) -> dict[str, list[float]]:
    """Returns the output, the token itself added, and the gradient of the rules: of shared ones, or of the first
    matrix'."""
    down, up = (
        module.PHMLinear(*each, phm_dim=2, c_init="normal", w_init="normal", **options).double()
        for each in ((6, 4), (4, 6))
    )
    rule, k = nn.Parameter(torch.empty(2, 2, 2).double()), 1.0
    with torch.no_grad():
        rule.copy_(wave(rule, 0.7))
        for part in (down, up):
            if options["factorized_phm"]:
                tensors = [part.W_left, part.W_right, part.b]
                part.set_phm_rule(rule)
            else:
                tensors = [part.phm_rule, part.W, part.b]
            for tensor in tensors:
                k += 0.3
                tensor.copy_(wave(tensor, k))
    x = wave(torch.empty(1, 6), 0.4)
    y = x + up(activation(down(x)))
    y.square().sum().backward()
    return {"outputs": y.flatten().tolist(), "rule": down.phm_rule.grad.flatten().tolist()}


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns them of Compacter, with shared rules and factors of rank 2, and of PHM, without."""
    module = load(checkout / SOURCE.script, root=checkout)
    activation = load(checkout / "seq2seq/adapters/adapter_utils.py").Activations("gelu_new")
    return {
        "compacter": adapter(module, activation, shared_phm_rule=True, factorized_phm=True, phm_rank=2),
        "phm": adapter(module, activation, factorized_phm=False),
    }
