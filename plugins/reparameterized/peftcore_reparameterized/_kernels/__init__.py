"""Fast functions for orthogonal methods, for methods with fixed random matrices, and for methods that scale outputs.
Each replaces a plain function (`plain_*`). Tests compare the two, and the plain function runs if
`peftcore.author.runs_plain` returns True."""

from peftcore_reparameterized._kernels.projections import plain_projected, projected
from peftcore_reparameterized._kernels.rotations import (
    plain_rotate,
    plain_rotated_linear,
    rotate,
    rotated,
    rotated_linear,
)
from peftcore_reparameterized._kernels.scaled_low_rank import (
    ScaledFactors,
    plain_scaled_low_rank_linear,
    scaled_low_rank_linear,
    scaled_update,
)
from peftcore_reparameterized._kernels.scaling import add_scaled, plain_add_scaled, plain_scaled_bases, scaled_bases
from peftcore_reparameterized._kernels.skew import cayley, neumann, plain_cayley, plain_neumann, plain_skew

__all__ = [
    "ScaledFactors",
    "add_scaled",
    "cayley",
    "neumann",
    "plain_add_scaled",
    "plain_cayley",
    "plain_neumann",
    "plain_projected",
    "plain_rotate",
    "plain_rotated_linear",
    "plain_scaled_bases",
    "plain_scaled_low_rank_linear",
    "plain_skew",
    "projected",
    "rotate",
    "rotated",
    "rotated_linear",
    "scaled_bases",
    "scaled_low_rank_linear",
    "scaled_update",
]
