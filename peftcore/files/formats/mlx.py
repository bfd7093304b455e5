"""Writes folders of mlx-lm: ``adapters.safetensors``, and an ``adapter_config.json`` that differs from peft's. peftcore
cannot load them.

In the last ``num_layers`` blocks, all modules with a given name have a LoRA with the factors ``lora_a`` ``[in, rank]``
and ``lora_b`` ``[rank, out]``. Modules without tensors in the file have zeros in ``lora_b``. All modules have the same
rank and scale, so lower ranks are padded, and scales are multiplied into ``lora_b``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import Tensor, nn

from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.description import Description, tensor_files
from peftcore.files.formats.format import Content, Files, Format, Tensors
from peftcore.files.formats.plain_lora import plain_lora
from peftcore.files.safe_io import read_json
from peftcore.injection.injection import Injection

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
BLOCK = re.compile(r"(?P<stem>(?:.*\.)?layers)\.(?P<index>\d+)\.(?P<key>.+)")


class MLX(Format):
    """The format of mlx-lm's folders."""

    name = "mlx"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        if not ((path / CONFIG).is_file() and (path / TENSORS).is_file()):
            return False
        try:
            return "lora_parameters" in read_json(path / CONFIG)
        except CheckpointError:
            return False

    def open(self, path: Path, model: nn.Module) -> Content:
        raise CheckpointError(
            f"{path}: peftcore writes folders of mlx-lm, but does not load them; load the adapter that was exported"
        )

    def describe(self, path: Path) -> Description:
        options = read_json(path / CONFIG)
        problem = "peftcore writes folders of mlx-lm, but does not load them"
        kind = str(options.get("fine_tune_type", "lora"))
        return Description(self.name, tensor_files(path), kind=kind, options=options, problem=problem)

    def files(self, injection: Injection, weights: bool = False) -> Files:
        pairs = plain_lora(injection, "mlx-lm")
        rank = max(len(pair.A) for pair in pairs.values())
        blocks = {path: BLOCK.fullmatch(path) for path in pairs}
        keys = {path: path if found is None else found["key"] for path, found in blocks.items()}
        indices = [int(found["index"]) for found in blocks.values() if found]
        config = {
            "fine_tune_type": "lora",
            "num_layers": _blocks(injection.model, indices),
            "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(set(keys.values()))},
        }
        tensors: dict[str, Tensor] = {}
        for path, pair in pairs.items():
            A, B = pair.filled(rank)
            tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = A.T.contiguous(), B.T.contiguous()
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        return {TENSORS: Tensors(tensors, {"format": "mlx"}), CONFIG: text}


def _blocks(model: nn.Module, indices: list[int]) -> int:
    """Returns the smallest number n such that the last n blocks include all adapted blocks.

    Raises:
        ExportError: the model's blocks are not found.
    """
    if not indices:
        return 0
    stacks = [each for path, each in model.named_modules() if path.rpartition(".")[2] == "layers"]
    if len(stacks) != 1:
        raise ExportError(
            f"mlx-lm counts blocks from the last one, in the list called layers; this model has {len(stacks)} of them"
        )
    return len(list(stacks[0].children())) - min(indices)
