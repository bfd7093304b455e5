"""What DiffFit for diffusers, whose authors are not the paper's, makes of two blocks of a DiT and of a UNet, in
float64, all numbers waves: ``python -m peftcore.testing.freeze difffit.py CHECKOUT``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "mkshing/DiffFit-pytorch", "78dc2d1", "difffit_pytorch/diffusers_models/attention.py")
VERSIONS = ("torch", "diffusers")
WIDTH, CONTEXT = 8, 6
SIZES: dict[str, dict[str, Any]] = {
    "dit": {
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 5,
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
    "unet": {"cross_attention_dim": CONTEXT},
}
TRAINED = ("bias", "norm", "gamma", "y_embed")
"""Words of which a name has one, where the tensor trains there."""
MATRICES = ("linear.weight", "linear_1.weight", "linear_2.weight")
"""What trains there only for the name of the module around it, norm1: what makes the modulation of a DiT."""


def wave(shape: Sequence[int], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(tuple(shape))


@torch.no_grad()
def waves(tensors: Mapping[str, Tensor], start: float) -> None:
    """Fill tensors by alphabet, each with another wave."""
    for index, name in enumerate(sorted(tensors)):
        tensors[name].copy_(0.5 * wave(tensors[name].shape, start + 0.37 * index))


def given(name: str) -> dict[str, Any]:
    """What the blocks are given beside the stream."""
    if name == "dit":
        return {"timestep": torch.tensor([3, 70]), "class_labels": torch.tensor([1, 4])}
    return {"encoder_hidden_states": wave((2, 3, CONTEXT), 0.6)}


def run(blocks: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Returns what goes in, of which a gradient is wanted, and what comes out of all blocks."""
    x = y = wave((2, 4, WIDTH), 0.9).requires_grad_()
    for block in blocks:  # type: ignore[attr-defined]
        y = block(y, **given(name))
    return x, y


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]


def found(name: str, block: type[nn.Module], processor: type[nn.Module], matrices: bool) -> dict[str, Any]:
    blocks = nn.ModuleList(block(WIDTH, 2, WIDTH // 2, **SIZES[name]) for _ in range(2)).double()
    waves(dict(blocks.named_parameters()), 0.1)
    for module in blocks.modules():
        if isinstance(module, nn.Module) and type(module).__name__ == "Attention":
            module.set_processor(processor(WIDTH).double())
    gammas = {key: tensor for key, tensor in blocks.named_parameters() if "gamma" in key}
    waves(gammas, 0.2)
    with torch.no_grad():
        for key, tensor in gammas.items():  # both behind an attention are one: this one is left out
            if "gamma_fnn" in key or ("processor" in key and not matrices):
                tensor.fill_(1)
    x, y = run(blocks.eval(), name)
    (y * wave(y.shape, 0.3)).sum().backward()
    trained = {key: p for key, p in blocks.named_parameters() if any(word in key for word in TRAINED)}
    gradients = {key: rounded(p.grad) for key, p in trained.items() if not key.endswith(MATRICES)}
    return {"output": rounded(y), "input": rounded(x.grad), "gradients": gradients}


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns outputs and gradients, by host and by where scale factors stand."""
    theirs = load(checkout / SOURCE.script, checkout)
    processor = load(checkout / "difffit_pytorch/diffusers_models/attention_processor.py", checkout)
    return {
        name: {
            scales: found(name, theirs.BasicTransformerBlock, processor.DiffFitAttnProcessor, scales == "matrices")
            for scales in ("branches", "matrices")
        }
        for name in SIZES
    }
