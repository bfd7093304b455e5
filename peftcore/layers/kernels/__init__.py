"""Fused kernels that methods of several families use at every step. Each kernel has an equal plain form (`plain_*`).
The tests compare both, and the plain form runs under torch.compile, torch.func and tracing."""

from peftcore.layers.kernels.autograd import runs_plain, saves_elsewhere, transformed
from peftcore.layers.kernels.fused_dropout import dropout_mask, dropped_linear, plain_dropped_linear
from peftcore.layers.kernels.low_rank import low_rank_linear, matmul_transposed, plain_low_rank_linear

__all__ = [
    "dropout_mask",
    "dropped_linear",
    "low_rank_linear",
    "matmul_transposed",
    "plain_dropped_linear",
    "plain_low_rank_linear",
    "runs_plain",
    "saves_elsewhere",
    "transformed",
]
