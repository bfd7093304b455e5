"""What the adapters of VL-Adapter's authors give for rows of two tasks, on tensors of sines:
``python -m peftcore.testing.freeze vl_adapter.py CHECKOUT``."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "ylsung/VL_adapter", "545fcbb", "VL-T5/src/adapters/adapter_controller.py")
VERSIONS = ("torch", "transformers")
WIDTH, TASKS = 6, ("0", "1", "2")
SHARED = {"all": {"use_single_adapter"}, "down": {"share_down_sampler"}, "up": {"share_up_sampler"}, "none": set()}


def wave(shape: Sequence[int], k: float) -> Tensor:
    """Returns sin(k), sin(2 k), ... in a shape."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * k + k).view(tuple(shape))


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns the output for rows of the tasks 2 and 0, and the gradients of the input and of all maps, flat: of each
    kind of tensor those of all tasks one behind the other, or the one that they share."""
    module = load(checkout / SOURCE.script, root=checkout / "VL-T5/src")
    configs = load(checkout / "VL-T5/src/adapters/config.py", root=checkout / "VL-T5/src")
    found = {}
    for shared, flags in SHARED.items():
        config: Any = configs.AdapterConfig()
        config.tasks, config.d_model, config.input_dim, config.reduction_factor = [*TASKS], WIDTH, WIDTH, 2
        config.track_z = config.shared_phm_rule_over_tasks = False
        for flag in ("use_single_adapter", "share_down_sampler", "share_up_sampler"):
            setattr(config, flag, flag in flags)
        controller = module.AdapterController(config).double()
        tables: dict[str, list[Tensor]] = {}
        for side, part in (("down", "down_sampler"), ("up", "up_sampler")):
            maps = list(dict.fromkeys(getattr(controller.adapters[task], part) for task in TASKS))
            tables[side] = [each.weight for each in maps]
            tables[f"{side}_bias"] = [each.bias for each in maps]
        with torch.no_grad():
            for index, rows in enumerate(tables.values()):
                for row, value in zip(rows, wave((len(rows), *rows[0].shape), 0.5 + 0.37 * index), strict=True):
                    row.copy_(value)
        x: Any = wave((2, 3, WIDTH), 0.9).requires_grad_()
        y: Any = torch.cat([controller(row[None], task) for row, task in zip(x, ("2", "0"), strict=True)])
        (y * wave((2, 3, WIDTH), 0.3)).sum().backward()
        found[shared] = {"y": y.flatten().tolist(), "x": x.grad.flatten().tolist()}
        for name, rows in tables.items():
            gradients = [torch.zeros_like(row) if row.grad is None else row.grad for row in rows]
            found[shared][name] = torch.stack(gradients).flatten().tolist()
    return found
