"""The data and the two hosts: handwritten digits, a vision transformer and a ConvNet that can read them upright."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

SEED = 0
BATCH_SIZE = 64


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] in -1 .. 1 and their labels."""

    images: Tensor
    labels: Tensor

    def turned(self) -> Digits:
        """The same digits, lying on their left side."""
        return Digits(torch.rot90(self.images, 1, (-2, -1)), self.labels)

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches for whoever asks."""
        drawn = torch.Generator().manual_seed(SEED)
        for _ in range(steps):
            chosen = torch.randint(len(self.labels), (BATCH_SIZE,), generator=drawn)
            yield self.images[chosen], self.labels[chosen]


def digits() -> tuple[Digits, Digits, Digits]:
    """1,000 to train on, 200 on which the learning rates were chosen, and 597 that the table is about."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(SEED))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(found.target)[order]
    train, tuning, test = (
        Digits(images[part], labels[part]) for part in (slice(1000), slice(1000, 1200), slice(1200, None))
    )
    return train, tuning, test


class ConvNet(nn.Module):
    """Grouped convolutions between residuals, as in ResNeXt, with group norms that keep no statistics."""

    def __init__(self, width: int = 32, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(4, width),
                nn.Conv2d(width, width, kernel_size=3, padding=1, groups=4),
                nn.ReLU(),
                nn.Conv2d(width, width, kernel_size=1),
            )
            for _ in range(blocks)
        )
        self.norm = nn.GroupNorm(4, width)
        self.head = nn.Linear(width * 16, 10)

    def forward(self, images: Tensor) -> Tensor:  # [batch, 1, 8, 8]
        hidden = self.stem(images)
        for number, block in enumerate(self.blocks):
            hidden = hidden + block(hidden)
            if number == 0:
                hidden = nn.functional.max_pool2d(hidden, 2)  # [batch, width, 4, 4]
        logits: Tensor = self.head(self.norm(hidden).relu().flatten(1))
        return logits


def vit() -> nn.Module:
    """timm's own class, 16 patches of 2 x 2 pixels."""
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=48,
        depth=3,
        num_heads=4,
        global_pool="avg",
    )
    return model


HOSTS: dict[str, Callable[[], nn.Module]] = {"ViT": vit, "ConvNet": ConvNet}
