"""Tensors to add and merge."""

import torch
from torch import Tensor

F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def rows(*values: list[float]) -> list[Tensor]:
    return [torch.tensor(each, dtype=F64) for each in values]


def close(a: Tensor, b: Tensor, error: float = 1e-12) -> bool:
    return a.shape == b.shape and float((a - b).detach().norm() / b.detach().norm()) < error
