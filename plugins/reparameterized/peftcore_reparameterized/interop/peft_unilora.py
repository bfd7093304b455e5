"""Uni-LoRA in peft's files (checked against peft 0.21).

``unilora_theta_d`` is stored for the whole adapter, and is peftcore's theta. With `save_indices` there are
``unilora_indices_A`` and ``_B`` at each module, and ``unilora_scales_A`` and ``_B`` of the selected entries. Without
that option, peft draws the indices by numpy from a seed, for the target modules in the order of the model. peftcore
draws the same indices, and saves them with the adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place, SavedSite, layer_of
from peftcore.errors import CheckpointError

FACTORS = ("A", "B")


class PeftUniLoRA(PeftMethod):
    """Translates indices into one vector."""

    methods = ("uni_lora",)
    below = tuple(f"unilora_{part}_{factor}" for part in ("indices", "scales") for factor in FACTORS)
    root = ("unilora_theta_d",)
    bias = "unilora_only"
    kinds = (nn.Linear, Transposed)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "proj_seed": "use projection_seed=",
        "theta_d_length": "use theta_length=",
        "init_theta_d_bound": "use theta_bound=",
        "save_indices": "use store_indices=",
    }

    def __init__(self) -> None:
        self.saved, self.length, self.seed = False, 0, 0
        self.targets: set[str] | None = None
        """The target modules in the file's options, if the file has no tensors at modules."""
        self.counts: Tensor | None = None
        """How often each entry of theta is selected at the places that have been read."""
        self.norm = torch.zeros(0)
        self.drawn: Tensor | None = None

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        self.saved, self.length = keys.take("save_indices", bool, False), keys.take("theta_d_length", int, 256)
        self.seed = keys.take("proj_seed", int, 42)
        return {
            "method": "uni_lora",
            "rank": keys.take("r", int, 4),
            "theta_length": self.length,
            "dropout": float(keys.take("unilora_dropout", float, 0.0)),
            "theta_bound": float(keys.take("init_theta_d_bound", float, 0.02)),
            "projection_seed": self.seed,
            "store_indices": True,
        }

    def meant(self, keys: Keys, paths: Collection[str]) -> set[str] | None:
        """Return the paths of the target modules, or None if stored indices determine them.

        Raises:
            CheckpointError: the file does not determine the target modules.
        """
        found = super().meant(keys, paths)
        if keys.take("save_indices", bool, False):
            return found
        if found is None:
            raise CheckpointError(f"{keys.where} has neither indices nor target_modules, so its modules are unknown")
        self.targets = found
        return None

    def selections(self, keys: Keys, sites: Sequence[SavedSite], model: nn.Module) -> dict[str, tuple[SavedSite, ...]]:
        if self.targets is None:
            return {"": tuple(sites)}
        here = [path for path, module in model.named_modules() if path in self.targets and _matrix(module)]
        return {"": tuple(SavedSite(module_path=path) for path in here)}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        if self.counts is None:
            self.counts, self.norm = torch.zeros(self.length, dtype=torch.long), torch.zeros(self.length)
        indices = {}
        for factor, start in zip(FACTORS, place.operator.starts, strict=True):
            shape = place.operator.get_tensor(f"index_{factor}").shape
            if self.saved:
                index = found.take(f"unilora_indices_{factor}", shape).long()
            else:
                index = self._drawn(place.operator.total)[start : start + shape.numel()].view(shape)
            if index.numel() and not (index.min() >= 0 and index.max() < self.length):
                found.wrong.append(f"unilora_indices_{factor} has entries outside of the {self.length} of the vector")
                continue
            self.counts += index.flatten().bincount(minlength=self.length)
            if self.saved:
                self.norm[index.flatten()] = found.take(f"unilora_scales_{factor}", shape).flatten().float()
            indices[f"index_{factor}"] = index.int()
        return indices

    def _drawn(self, total: int) -> Tensor:
        if self.drawn is None:
            self.drawn = as_peft_draws(total, self.length, self.seed)
        return self.drawn

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        assert self.counts is not None  # of all places, which are read before
        norm, picked = self.counts.clamp(min=1).double().rsqrt(), self.counts > 0
        if self.saved and ((self.norm / norm - 1).abs() > 0.01)[picked].any():  # peft rounds them as the weights
            found.wrong.append("unilora_scales do not match how often the indices pick each entry")
        return {"theta": found.take("unilora_theta_d", (self.length,)), "norm": norm}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "r": config.rank,
            "theta_d_length": config.theta_length,
            "unilora_dropout": config.dropout,
            "init_theta_d_bound": config.theta_bound,
            "proj_seed": config.projection_seed,
            "save_indices": True,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        operator, found = place.operator, {}
        for each in FACTORS:
            index = operator.get_tensor(f"index_{each}").long()
            found[f"unilora_indices_{each}"] = index
            found[f"unilora_scales_{each}"] = operator.theta.module.norm[index]
        return found

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        return {"base_model.unilora_theta_d": module.get_parameter("theta")}


def _matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or isinstance(layer_of(module, "weight"), Transposed)


def as_peft_draws(total: int, length: int, seed: int) -> Tensor:
    """Return the indices that peft draws from a seed."""
    import numpy as np

    generator = np.random.default_rng(seed)
    drawn = np.repeat(np.arange(length), total // length)
    if total % length:
        drawn = np.concatenate([drawn, generator.choice(length, size=total % length, replace=False)])
    generator.shuffle(drawn)
    return torch.from_numpy(drawn)
