"""The memory per process, in bytes, of a planned model that is sharded. It assumes FSDP2 with AdamW. Each block is one
unit, and all modules outside of blocks are another unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from peftcore.errors import ConfigError, UnsupportedHost, shown
from peftcore.layers.layer import is_dense
from peftcore.roles import HostMap
from peftcore.surgery.installation import shelves

if TYPE_CHECKING:
    from peftcore.contract.surgeon_protocol import Surgeon

STATES = 2
"""The number of values that AdamW keeps for each trainable value."""

Units = Mapping[Tensor, str]
"""For each parameter, the path of its block; "" if it is outside of all blocks."""


@dataclass(frozen=True)
class Shard:
    """The bytes of one process, without activations and unreduced gradients, which depend on the batch of the
    process."""

    weights: int
    """The process's shards of the base's parameters, and all of the base's buffers, which are not sharded."""
    adapter: int
    """The process's shards of the adapter's parameters, and all of the adapter's buffers."""
    gradients: int
    """The process's shards of the gradients of all trainable parameters."""
    optimizer: int
    """AdamW's states for the process's shards of trainable parameters."""
    gathered: int
    """The parameters that are gathered while the largest block runs: those of this block, and those outside of all
    blocks. If the next block is prefetched, this is more."""

    def __str__(self) -> str:
        return (
            f"{self.weights:,} bytes of weights, {self.adapter:,} of the adapter, {self.gradients:,} of gradients, "
            f"{self.optimizer:,} of AdamW's states, and {self.gathered:,} gathered"
        )


def shards_of(surgeon: Surgeon, processes: int) -> tuple[Shard, ...]:
    """Returns the memory of each process for a model that is sharded after the recorded operators are installed.

    Raises:
        ConfigError: `processes` is not a valid number of processes.
        UnsupportedHost: FSDP2 cannot shard one of the parameters.
    """
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise ConfigError(f"shards= must be a number of processes, 1 or more, not {shown(processes)}")
    model = surgeon.model
    owners = _owners(model, surgeon.resolver.host)
    base = units_of(model, surgeon.resolver.host)
    operators = [(owners[holder], operator) for holder, _, operator in shelves(surgeon)]
    added: dict[Tensor, str] = {each: own for own, operator in reversed(operators) for each in operator.parameters()}
    trained = [each for each in added if each.requires_grad]
    kept = {each for _, operator in operators for each in operator.buffers()}
    return cut(base, set(model.buffers()), added, kept, trained, processes)


def units_of(model: nn.Module, host: HostMap) -> Units:
    """Returns the unit of each parameter of a model."""
    owners = _owners(model, host)
    return {each: owner for module, owner in owners.items() for each in module.parameters(recurse=False)}


def cut(
    base: Units, buffers: Iterable[Tensor], added: Units, kept: Iterable[Tensor], trained: Iterable[Tensor], n: int
) -> tuple[Shard, ...]:
    """Returns the memory of each of `n` processes.

    Args:
        base: the base's parameters.
        buffers: the base's buffers.
        added: the adapter's parameters.
        kept: the adapter's buffers.
        trained: the trainable parameters of base and adapter.
        n: the number of processes.

    Raises:
        UnsupportedHost: FSDP2 cannot shard one of the parameters.
    """
    for each in (*base, *added):
        if not each.ndim or not is_dense(each):
            what = "a scalar" if not each.ndim else f"packed ({each.dtype})"
            raise UnsupportedHost(
                f"a parameter of shape {tuple(each.shape)} is {what}, which the plan for FSDP2 does not support: call "
                "plan without shards="
            )
    units = Counter[str]()
    for each, unit in {**base, **added}.items():
        units[unit] += n * piece(each, 0, n)  # gathered with the rows that fill the last pieces up
    gathered = units.pop("", 0) + max(units.values(), default=0)
    held = [sum(each.nbytes for each in tensors) for tensors in (buffers, kept)]

    def shard(process: int) -> Shard:
        weights, adapter, gradients = (
            sum(piece(each, process, n) for each in tensors) for tensors in (base, added, trained)
        )
        return Shard(weights + held[0], adapter + held[1], gradients, STATES * gradients, gathered)

    return tuple(map(shard, range(n)))


def piece(tensor: Tensor, process: int, processes: int) -> int:
    """Returns the bytes of one process's shard of a tensor. The first dimension is split into chunks of equal size. The
    last chunks may be smaller or empty."""
    rows = tensor.shape[0]
    each = -(-rows // processes)
    mine = max(0, min(each, rows - process * each))
    return mine * (tensor.nbytes // max(rows, 1))


def _owners(model: nn.Module, host: HostMap) -> dict[nn.Module, str]:
    """Returns, for each module, the path of the innermost block that contains it or is it; "" if there is none."""
    blocks = {entry.path for entry in host.entries if entry.role == "block"}
    found: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        above = found[model.get_submodule(path.rpartition(".")[0])] if path else ""
        found[module] = path if path in blocks else above
    return found
