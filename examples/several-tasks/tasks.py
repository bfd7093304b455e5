"""Three small tasks of scikit-learn, each as pictures of 8 x 8 numbers: digits that lie on their side, kinds of wine by
13 measurements, and breast tumours by 30."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn

TRAIN = 150
"""Examples of each task at most; of wines there are 89, half of all. What is left is scored, at most 400 of a task."""


@dataclass(frozen=True)
class Task:
    """Pictures [n, 1, 8, 8] in -1 .. 1 with their classes from 0 on, to train on and to score."""

    name: str
    classes: int
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def tasks() -> list[Task]:
    """The three tasks, always with the same examples."""
    digits: Any = load_digits()
    lying = np.rot90(digits.images, 1, (1, 2)) / 8 - 1
    return [
        _task("digits", lying, digits.target),
        *(_task(name, _picture(read()), read().target) for name, read in TABLES.items()),
    ]


TABLES: dict[str, Any] = {"wines": load_wine, "tumours": load_breast_cancer}


def upright() -> tuple[Tensor, Tensor]:
    """The digits that the model knows before: none of the lying ones is among them."""
    digits: Any = load_digits()
    order = _order(len(digits.target))[TRAIN + 400 :]
    return _tensors(digits.images[order] / 8 - 1, digits.target[order])


def encoder(classes: int) -> nn.Module:
    """timm's ViT with 16 patches of 2 x 2 pixels."""
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=classes,
        embed_dim=48,
        depth=3,
        num_heads=4,
        global_pool="avg",
    )
    return model


def _order(count: int) -> Any:
    return np.random.default_rng(0).permutation(count)


def _task(name: str, pictures: Any, classes: Any) -> Task:
    order = _order(len(classes))
    cut = min(TRAIN, len(order) // 2)
    train, held_out = order[:cut], order[cut : cut + 400]
    parts = (_tensors(pictures[rows], classes[rows]) for rows in (train, held_out))
    return Task(name, int(classes.max()) + 1, *parts)


def _picture(table: Any) -> Any:
    """Ranks of the measurements in -1 .. 1, in the first pixels; the others are 0."""
    ranks = table.data.argsort(0).argsort(0) / (len(table.data) - 1) * 2 - 1
    return np.pad(ranks, ((0, 0), (0, 64 - ranks.shape[1]))).reshape(-1, 8, 8)


def _tensors(pictures: Any, classes: Any) -> tuple[Tensor, Tensor]:
    return torch.tensor(np.ascontiguousarray(pictures), dtype=torch.float32)[:, None], torch.tensor(classes)
