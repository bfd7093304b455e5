"""What the authors of SPT choose in a small vision transformer, and what it computes and learns then, on tensors of
cosines; and what they chose in ViT-B/16; what changes start from, what trains, and the options of a command:
``python -m peftcore.testing.freeze spt_lora.py CHECKOUT``."""

import math
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "ziplab/SPT", "e385f67", "engine.py")
VERSIONS = ("torch", "timm")
ABSENT = ("lib.datasets", "lib.samplers", "mmcv", "mmcv.runner")
CHOSEN = "sensitivity_spt_supervised_lora_a10/cifar/param_req_0.4.pth"
SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 3}
SMALL: dict[str, Any] = {**SIZES, "embed_dim": 8, "depth": 2, "mlp_ratio": 2.0}
RANK = 2
UPDATED = [[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0]]
"""Which of q, k, v, proj, fc1 and fc2 of each block has an update."""
WHOLE = ["blocks.0.norm1.weight", "blocks.1.norm2.bias", "blocks.1.attn.q.bias", "norm.weight"]
ENTRIES = {
    "blocks.0.attn.k.weight": (3, 17, 40, 63),
    "blocks.0.attn.v.bias": (1, 6),
    "blocks.0.mlp.fc1.bias": (0, 5, 15),
    "blocks.1.attn.q.weight": (8, 9, 30),
    "blocks.1.mlp.fc2.weight": (2, 16, 127),
}
"""What trains besides: whole vectors, and places in flat tensors."""


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def base(shape: Sequence[int], name: str) -> Tensor:
    """A tensor of the model that changes; the scales of norms are around 1."""
    return wave(shape, name) + (1 if "norm" in name and name.endswith("weight") else 0)


def transformers(checkout: Path) -> Any:
    """Returns the module of their transformers."""
    file = checkout / "model" / "vision_transformer_timm.py"
    return load(file, root=checkout, absent=("model.swin_transformer",))


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns what a budget chooses ("0.05" and others), what a model with changes computes ("tuned"), and what the
    authors found for a data set in ViT-B/16 ("cifar")."""
    engine, module = load(checkout / SOURCE.script, root=checkout), transformers(checkout)
    return {**chosen(engine, module), "tuned": tuned(module), "cifar": in_a_vit(checkout)}


def chosen(engine: Any, module: Any) -> dict[str, Any]:
    """Returns what budgets of 0.05 to 0.2 million choose with updates of rank 32.

    For each: the number of the largest scores that it takes; the matrices with low-rank updates and the vectors that
    train as a whole, by name; and for all others how many entries train, and the sum of their places. The model is
    small, so the sweep goes in steps of 2,500, an eighth of theirs.
    """
    model = module.VisionTransformerSepQKV(**SIZES).double()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(wave(parameter.shape, name) / 4)
    taken: list[int] = []
    found: dict[str, Any] = {}
    engine.math = SimpleNamespace(
        isfinite=math.isfinite, ceil=lambda number: taken.append(round(number) // 8) or taken[-1]
    )

    def keep(result: dict[str, Any], path: str) -> None:
        found[path.rpartition("_")[2]] = {"tau": taken[-1], **places(result)}

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


def places(result: dict[str, Any]) -> dict[str, Any]:
    """What their files say, by names: matrices, vectors, and of entries how many there are and the sum of their
    places."""
    names = result["unstructured_name_shapes"]
    sizes = [math.prod(shape) for shape in names.values()]
    mask = torch.zeros(sum(sizes))
    mask[result["unstructured_indexes"]] = 1
    entries = {name: part.nonzero().flatten() for name, part in zip(names, mask.split(sizes), strict=True)}
    matrices = [f"{b} {m}" for b, row in enumerate(result["tuned_matrices"]) for m, one in enumerate(row) if one]
    return {
        "matrices": matrices,
        "vectors": result["tuned_vectors"],
        "entries": {name: [len(each), int(each.sum())] for name, each in entries.items() if len(each)},
    }


def tuned(module: Any) -> dict[str, Any]:
    """Returns the logits of two images, the gradients of the first image's first channel, and those of all changes."""
    model = changed(module).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(base(parameter.shape, name))
            if name in WHOLE:
                parameter.add_(wave(parameter.shape, f"change of {name}"))
    x = (4 * wave((2, 3, 8, 8), "x")).requires_grad_()
    y = model(x)
    (y * wave(y.shape, "direction")).sum().backward()
    assert x.grad is not None
    changes = {name: each for name, each in model.named_parameters() if "structured" in name or "sparse" in name}
    changes |= {name: model.get_parameter(name) for name in WHOLE}
    parts = {"y": y, "x": x.grad[0, 0], **{name: each.grad for name, each in changes.items()}}
    return {name: part.flatten().tolist() for name, part in parts.items()}


def changed(module: Any, width: int = SMALL["embed_dim"], rank: int = RANK, **options: Any) -> Any:
    """Returns a model of theirs with updates, entries and whole vectors, of which nothing drops."""
    sizes = {**SMALL, "embed_dim": width}
    shapes = {name: parameter.shape for name, parameter in module.VisionTransformerSepQKV(**sizes).named_parameters()}
    index = {name: torch.stack(torch.unravel_index(torch.tensor(at), shapes[name]), 1) for name, at in ENTRIES.items()}
    with mock.patch.object(Tensor, "cuda", lambda tensor: tensor):
        return module.VisionTransformerSPT(
            **sizes,
            structured_list=UPDATED,
            low_rank_dim=rank,
            block="BlockSPTParallel",
            structured_type="lora",
            unstructured_indexes=index,
            unstructured_shapes={name: shapes[name] for name in ENTRIES},
            fully_fine_tuned_keys=WHOLE,
            freeze_backbone=True,
            **{"no_structured_drop_out": True, "no_structured_drop_path": True, **options},
        )


def in_a_vit(checkout: Path) -> dict[str, Any]:
    """Returns what they chose for CIFAR-100, and how many parameters that is, in millions, 768 of them of a token."""
    scalar = (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")
    with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype("int64"))]):
        result = torch.load(checkout / CHOSEN, map_location="cpu", weights_only=True)
    return {"millions": float(result["params"]), **places(result)}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what updates of rank 20 of a model that is 200 wide start from, taken together, and entries."""
    model = changed(transformers(checkout), width=200, rank=20)
    kinds = {"A": ".learnable.0.", "B": ".learnable.1.", "entries": ".sparse_"}
    found = {
        kind: [p.flatten() for name, p in model.named_parameters() if part in name] for kind, part in kinds.items()
    }
    return {kind: drawn(torch.cat(each)) for kind, each in found.items()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what trains in their model with updates, entries and whole vectors."""
    model = changed(transformers(checkout))
    return {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of a command that names none, and the dropout in front of updates."""
    train = load(checkout / "train_spt.py", root=checkout, absent=ABSENT)
    told = train.get_args_parser().parse_args(["--model_name", "any"])
    model = changed(transformers(checkout), no_structured_drop_out=told.no_structured_drop_out)
    found = {"rank": told.low_rank_dim, "ease": told.alpha, "vector_ease": told.beta}
    found |= {"batches": told.sensitivity_batch_num, "dropout": model.blocks[0].attn.structured_drop.p}
    return found
