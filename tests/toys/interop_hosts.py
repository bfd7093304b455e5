"""A small transformer and an MLP, for what torch does to whole models: compile, export, copy, shard."""

from typing import Any

import torch
from torch import Tensor, nn

import peftcore

METHODS = ("lora", "dora", "ia3", "houlsby_adapter", "bitfit", "ln_tuning", "linear_probe")
WIDTH = 16


class Attention(nn.Module):
    """Attention with a fused projection, whose rows can be adapted one part at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-2, -3)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Blocks over vectors, and a head on their mean."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Mlp(nn.Module):
    """Two layers and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


def encoder(depth: int = 1) -> Encoder:
    """A seeded host in eval mode."""
    torch.manual_seed(0)
    return Encoder(depth).eval()


def mlp() -> Mlp:
    """A seeded host in eval mode."""
    torch.manual_seed(0)
    return Mlp().eval()


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def adapt(model: nn.Module, method: str, *, seed: int = 0, scale: float = 0.1, **arguments: Any) -> peftcore.Injection:
    """Apply a method and move its tensors by seeded noise, so that it does something."""
    injection = peftcore.apply(model, method, seed=seed, **arguments)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter))
    return injection


def gradients(injection: peftcore.Injection) -> dict[str, Tensor]:
    """The gradients of an injection by the names that files use; they are cleared."""
    found = {}
    for path, module in injection.modules():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{path}.{name} has no gradient"
            found[f"{path}.{name}"] = parameter.grad.clone()
            parameter.grad = None
    return found
