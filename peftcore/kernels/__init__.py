"""What several methods compute at every step, arranged for speed. Each stands for plain mathematics (`plain_*`), which
the tests hold it against, and which runs under torch.compile, torch.func and wherever autograd is not plain."""

from peftcore.kernels.autograd import is_plain, saves_elsewhere, transformed
from peftcore.kernels.dropout import dropped_linear, keep, plain_dropped_linear
from peftcore.kernels.low_rank import (
    ScaledFactors,
    low_rank_linear,
    narrow,
    plain_low_rank_linear,
    plain_scaled_low_rank_linear,
    scaled_low_rank_linear,
)
from peftcore.kernels.projections import plain_projected, projected
from peftcore.kernels.rotations import plain_rotate, plain_rotated_linear, rotate, rotated_linear
from peftcore.kernels.scaling import add_scaled, plain_add_scaled, plain_scaled_bases, scaled_bases
from peftcore.kernels.skew import (
    cayley,
    neumann,
    plain_cayley,
    plain_neumann,
    plain_skew,
)

__all__ = [
    "ScaledFactors",
    "add_scaled",
    "cayley",
    "dropped_linear",
    "is_plain",
    "keep",
    "low_rank_linear",
    "narrow",
    "neumann",
    "plain_add_scaled",
    "plain_cayley",
    "plain_dropped_linear",
    "plain_low_rank_linear",
    "plain_neumann",
    "plain_projected",
    "plain_rotate",
    "plain_rotated_linear",
    "plain_scaled_bases",
    "plain_scaled_low_rank_linear",
    "plain_skew",
    "projected",
    "rotate",
    "rotated_linear",
    "saves_elsewhere",
    "scaled_bases",
    "scaled_low_rank_linear",
    "transformed",
]
