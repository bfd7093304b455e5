"""Peft's option `layer_replication`: ranges of layers that a model runs, some of them repeatedly, with a separate LoRA
for each run.

peft replicates the layers of the model when it loads the file. In peftcore this is a separate call,
`peftcore.replicate_layers`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peftcore.author.formats import Keys, replicated_layers, runs
from peftcore.errors import CheckpointError, HostMismatch, shown

MOST = 1000
"""Largest number of ranges of layers in a file, and of layers in a range."""


def check_replication(keys: Keys, model: nn.Module) -> None:
    """Verify that the model runs its layers in the ranges that the file specifies, if any.

    Raises:
        CheckpointError: the option is not a list of ranges, or there are too many layers in it.
        HostMismatch: the model runs its layers in another order.
    """
    ranges = keys.take("layer_replication", list, None)
    if ranges and not runs(model, _as_ranges(ranges, keys)):
        raise HostMismatch(
            f"{keys.where}: the model runs its layers in the ranges {shown(ranges)}, and this one does not; call "
            f"peftcore.replicate_layers(model, {shown(ranges)}) first"
        )


def written_replication(model: nn.Module) -> dict[str, Any]:
    """Returns the option for a model with replicated layers; an empty dict for other models."""
    ranges = list(replicated_layers(model).values())
    return {"layer_replication": ranges[0]} if ranges else {}


def _as_ranges(ranges: list[Any], keys: Keys) -> list[list[int]]:
    pairs = all(isinstance(each, list) and len(each) == 2 and all(type(n) is int for n in each) for each in ranges)
    if not pairs or len(ranges) > MOST or any(stop - start > MOST for start, stop in ranges):
        raise CheckpointError(f"{keys.where}: 'layer_replication' is {shown(ranges)}, expected pairs of numbers")
    return ranges
