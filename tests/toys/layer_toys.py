"""A module of every kind of layer: what is called, and what is only read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


def gpt_conv1d() -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils")
    return utils.Conv1D(6, 4)


class Stacked(nn.Module):
    """Three matrices in one parameter."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up_proj = nn.Parameter(torch.randn(3, 4, 6) if transposed else torch.randn(3, 6, 4))


CALLED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(4, 6), lambda: torch.randn(2, 3, 4)),
    "Linear without bias": (lambda: nn.Linear(4, 6, bias=False), lambda: torch.randn(4)),
    "GPT-2's Conv1D": (gpt_conv1d, lambda: torch.randn(2, 3, 4)),
    "Embedding": (lambda: nn.Embedding(11, 6), lambda: torch.tensor([[0, 3, 10], [1, 1, 2]])),
    "Embedding with padding": (
        lambda: nn.Embedding(11, 6, padding_idx=3),
        lambda: torch.tensor([[0, 3, 10], [1, 1, 2]]),
    ),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), dilation=2), lambda: torch.randn(2, 4, 9, 8)),
    "Conv2d, same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: torch.randn(2, 4, 5, 5)),
    "Conv2d, pointwise, no bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: torch.randn(2, 4, 5, 5)),
    "Conv2d without a batch": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 6, 2, padding=1), lambda: torch.randn(2, 2, 3, 4, 5)),
}
READ: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "grouped Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", (6, 2, 3, 3)),
    "depthwise Conv1d": (lambda: nn.Conv1d(4, 8, 3, groups=4), "weight", (8, 1, 3)),
    "reflecting Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding_mode="reflect"), "weight", (6, 4, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), "weight", (6, 4, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2)), "weight", (6, 4, 3, 2)),
    "grouped ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", (6, 2, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(6), "weight", (6,)),
    "bias": (lambda: nn.Linear(4, 6), "bias", (6,)),
    "packed projection": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", (12, 4)),
    "tensor of a child": (lambda: nn.MultiheadAttention(4, 2), "out_proj.weight", (4, 4)),
    "convolution of a child": (lambda: nn.Sequential(nn.Conv1d(6, 6, 3, groups=6)), "0.weight", (6, 1, 3)),
    "table of a child": (lambda: nn.Sequential(nn.Embedding(11, 6)), "0.weight", (6, 11)),
    "experts": (lambda: Stacked(False), "up_proj", (3, 6, 4)),
    "transposed experts": (lambda: Stacked(True), "up_proj", (3, 6, 4)),
    "Embedding with max_norm": (lambda: nn.Embedding(11, 6, max_norm=1.0), "weight", (6, 11)),
}
