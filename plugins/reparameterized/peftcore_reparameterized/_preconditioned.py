"""Gradients of two low-rank factors, multiplied by the inverse of the other factor's Gram matrix: the rules of LoRA-FA
and of Riemannian preconditioned LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.author import GradientRule, Operator


@dataclass(frozen=True)
class Preconditioner:
    """The matrix that the gradient of one factor is multiplied by: ``inverse(other to itself + damping I)``."""

    other: Callable[[], Tensor]
    """The other factor: A ``[*experts, rank, in, *kernel]`` for B, B ``[*experts, out, rank]`` for A."""
    of_A: bool
    """Whether the gradient is that of A, which is multiplied from the left. That of B is multiplied from the right."""
    damping: float
    """The number that is added to the diagonal."""
    divisor: float = 1.0
    """Divisor of the product."""

    def __call__(self, grad: Tensor) -> Tensor:
        """Return the preconditioned gradient of a factor, in the dtype of `grad`."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        other = self.other().detach().to(grad.device, wide)
        rows = other.mT if self.of_A else other.flatten(grad.dim() - 1)  # [*experts, rank, other dimension]
        gram = rows @ rows.mT
        gram = gram + self.damping * torch.eye(gram.shape[-1], dtype=wide, device=gram.device)
        inverse = torch.linalg.pinv(gram, hermitian=True) / self.divisor
        if not self.of_A:
            return (grad.to(wide) @ inverse).to(grad.dtype)
        flat = grad.to(wide).flatten(inverse.dim() - 1)  # [*experts, rank, in * kernel]
        return (inverse @ flat).view(grad.shape).to(grad.dtype)


class Preconditioned(GradientRule):
    """The rule that multiplies the gradients of factors by their preconditioners. Other gradients are unchanged."""

    def __init__(self, of: Mapping[nn.Parameter, Preconditioner]) -> None:
        super().__init__()
        self.of = of

    def project(self, grad: Tensor, param: nn.Parameter) -> Tensor:
        return self.of[param](grad) if param in self.of else grad


def riemannian(operator: Operator, damping: float) -> dict[nn.Parameter, Preconditioner]:
    """Return the preconditioners of both factors of an operator. They refer to the parameters themselves, since sharded
    parameters are whole only in the optimizer."""
    A, B = operator.get_parameter("A"), operator.get_parameter("B")
    return {A: Preconditioner(lambda: B, True, damping), B: Preconditioner(lambda: A, False, damping)}


def fixed_projection(operator: Operator) -> dict[nn.Parameter, Preconditioner]:
    """Return the preconditioner of B in LoRA-FA. With it, the gradient g of B makes ``s g A`` as close as possible to
    the gradient of the weight."""
    factors = operator.factors()
    assert factors is not None
    B = operator.get_parameter("B")
    return {B: Preconditioner(lambda: operator.get_tensor("A"), False, 1e-8, factors[2] ** 2)}
