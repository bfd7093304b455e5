"""LoRA-FA's fixed projection: A stays as it was drawn, and the gradient of B is made up for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftcore import GradientRule, Operator, Site
from peftcore.errors import UnsupportedSite


def fix_projection(operator: Operator, site: Site) -> None:
    """Make the factor A of an operator a buffer, which no optimizer sees.

    Raises:
        UnsupportedSite: it is zero there, so that B alone would never train.
    """
    if site.layer.one_hot:
        raise UnsupportedSite(f"{site.path} is an embedding, whose A is zero: B alone would never train it")
    A = operator.get_tensor("A").detach()
    del operator.A
    operator.register_buffer("A", A)


class Rescaled(GradientRule):
    """LoRA-FA's gradient of B [*experts, out, rank]: that of which s g A is the nearest to the weight's gradient."""

    def __init__(self, operators: Mapping[nn.Parameter, Operator]) -> None:
        super().__init__()
        self.operators = operators

    def project(self, grad: Tensor, param: nn.Parameter) -> Tensor:
        if param not in self.operators:
            return grad
        factors, wide = self.operators[param].factors(), torch.promote_types(grad.dtype, torch.float32)
        assert factors is not None
        drawn, _, scale = factors
        A = drawn.to(grad.device, wide).flatten(grad.dim() - 1)  # [*experts, rank, in * kernel]
        gram = A @ A.mT + 1e-8 * torch.eye(A.shape[-2], dtype=wide, device=A.device)
        return (grad.to(wide) @ torch.linalg.pinv(gram, hermitian=True) / scale**2).to(grad.dtype)
