"""What the authors of SPT choose in a small vision transformer, on tensors of cosines: ``python -m
peftcore.testing.freeze spt_lora.py CHECKOUT``."""

import math
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "ziplab/SPT", "e385f67", "engine.py")
VERSIONS = ("torch", "timm")
SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 3}


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns what budgets of 0.05 to 0.2 million choose with updates of rank 32.

    For each: the number of the largest scores that it takes; the matrices with low-rank updates and the vectors that
    train as a whole, by name; and for all others how many entries train, and the sum of their places. The model is
    small, so the sweep goes in steps of 2,500, an eighth of theirs.
    """
    engine = load(checkout / SOURCE.script, root=checkout)
    absent = ("model.swin_transformer",)
    module = load(checkout / "model" / "vision_transformer_timm.py", root=checkout, absent=absent)
    model = module.VisionTransformerSepQKV(**SIZES).double()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(wave(parameter.shape, name) / 4)
    taken: list[int] = []
    found: dict[str, Any] = {}
    engine.math = SimpleNamespace(
        isfinite=math.isfinite, ceil=lambda number: taken.append(round(number) // 8) or taken[-1]
    )

    def keep(result: dict[str, Any], path: str) -> None:
        names = result["unstructured_name_shapes"]
        sizes = [math.prod(shape) for shape in names.values()]
        mask = torch.zeros(sum(sizes))
        mask[result["unstructured_indexes"]] = 1
        places = {name: part.nonzero().flatten() for name, part in zip(names, mask.split(sizes), strict=True)}
        matrices = [f"{b} {m}" for b, row in enumerate(result["tuned_matrices"]) for m, one in enumerate(row) if one]
        found[path.rpartition("_")[2]] = {
            "tau": taken[-1],
            "matrices": matrices,
            "vectors": result["tuned_vectors"],
            "entries": {name: [len(each), int(each.sum())] for name, each in places.items() if len(each)},
        }

    batches = [(wave((2, 3, 8, 8), f"images {n}"), torch.tensor([n % 3, 2])) for n in range(3)]
    zeros = torch.zeros_like
    with (
        mock.patch.object(engine.utils, "save_on_master", keep),
        mock.patch.object(engine.os, "makedirs"),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch, "zeros_like", lambda like, device=None: zeros(like)),
    ):
        run = partial(engine.get_sensitivity, model, nn.CrossEntropyLoss(), batches, torch.device("cpu"), amp=False)
        run(structured_type="lora", alpha=2.0, beta=5.0, low_rank_dim=32, sensitivity_batch_num=2)
    return {budget: found[f"{budget}.pth"] for budget in ("0.05", "0.1", "0.2")}
