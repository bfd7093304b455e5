"""Linear layers whose rows or columns are distributed over processes (tensor parallelism of transformers and torch).

Operators act on the whole weight, which all processes gather. The effective weight is sharded again, so each process
computes with its own piece. Every process has whole operators and their whole gradients. Without gradients,
transformers replaces the distributed tensor by its local piece. Therefore the layer stores how the whole tensor is
sharded.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import UnsupportedSite
from peftcore.layers.layer import Layer
from peftcore.layers.pieces import is_cut

WHOLE = "merge the adapter into the whole model, and shard the result"


@dataclass(frozen=True)
class Cut:
    """How one tensor is sharded: the processes, the dimension, and the shape of the whole tensor."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Any) -> Cut:
        """Returns how a distributed tensor is sharded."""
        return cls(tensor.device_mesh, tensor.placements, tensor.shape)

    def whole(self, piece: Tensor) -> Tensor:
        """Returns the whole tensor, gathered from the pieces of all processes, without gradients."""
        stride = torch.empty(self.shape, device="meta").stride()
        tensors: Any = sys.modules["torch.distributed.tensor"]
        distributed = tensors.DTensor.from_local(
            piece, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride
        )
        whole: Tensor = distributed.full_tensor()
        return whole

    def piece(self, whole: Tensor) -> Any:
        """Returns the tensor `whole`, which every process has, as a distributed tensor that is sharded in this way.
        Gradients flow back to `whole`."""
        tensors: Any = sys.modules["torch.distributed.tensor"]
        copies = tensors.DTensor.from_local(whole, self.mesh, [tensors.Replicate()], run_check=False)
        return copies.redistribute(placements=self.placements)


@dataclass(frozen=True)
class ParallelLinear(Layer):
    """A weight or bias of a linear layer that is sharded over processes."""

    cuts: dict[str, Cut] = field(default_factory=dict, hash=False)
    """How each tensor of the module is sharded, including a missing bias."""

    @property
    def in_pieces(self) -> bool:
        return True

    @property
    def one_product(self) -> bool:
        return True

    @property
    def as_stored(self) -> Layer:
        return self

    def read(self, module: nn.Module, tensor: str) -> Tensor | None:
        held = module._parameters.get(tensor)
        if held is None or held.is_meta:
            return held
        return held.full_tensor() if is_cut(held) else self.cuts[tensor].whole(held)  # type: ignore[attr-defined]

    def held(self, module: nn.Module, tensor: str) -> Tensor | None:
        return module._parameters.get(tensor)

    def has(self, module: nn.Module, tensor: str) -> bool:
        return self.held(module, tensor) is not None

    def shape(self, module: nn.Module, tensor: str) -> torch.Size:
        return self.cuts[tensor].shape

    def like(self, module: nn.Module, tensor: str) -> Tensor:
        held = module._parameters.get(tensor)
        return next(module.parameters()) if held is None else held

    def for_forward(self, module: nn.Module, tensor: str, effective: Tensor | None) -> Tensor | None:
        if effective is None:
            return None
        cut = self.cuts[tensor]
        piece: Any = cut.piece(effective)
        distributed: Tensor = piece
        if is_cut(self.like(module, "weight")):
            return distributed
        if tensor == "bias" and not self.by_rows and cut.mesh.get_local_rank() != 0:
            return torch.zeros_like(effective)  # what comes out is summed, and the bias counts once
        local: Tensor = piece.to_local()
        return local

    @property
    def by_rows(self) -> bool:
        """Whether a process has some rows of the weight and the whole input (transformers calls this column-wise, for
        the transposed weight). Otherwise it has some columns, and the outputs are summed over processes."""
        return bool(self.cuts["weight"].placements[0].is_shard(0))

    def adds_bias_late(self, module: nn.Module) -> bool:
        """Whether the module's bias is added to the sum of the outputs of all processes, instead of by the module
        itself, in forwards without gradients."""
        return not self.by_rows and self.has(module, "bias")


def agree(module: nn.Module, layer: ParallelLinear) -> None:
    """Broadcast the values of an adapter's module from the first of the processes that share a layer. Gradients are
    equal in these processes, so the values must be equal too, even if the seeds of the processes differ."""
    group = layer.cuts["weight"].mesh.get_group()
    first = torch.distributed.get_global_rank(group, 0)
    for each in (*module.parameters(), *module.buffers()):
        torch.distributed.broadcast(each.detach(), first, group=group)


def parallel_linear(module: nn.Module, tensor: str, called: bool) -> Layer | None:
    """Returns the layer of a linear module's own weight or bias, if the tensor is sharded over processes; else None.

    Args:
        called: whether the module's forward is that of torch's linear layer.

    Raises:
        UnsupportedSite: the tensor is sharded in a way that peftcore does not support.
    """
    weight: Any = module._parameters.get("weight")
    if weight is None or not is_cut(weight) or tensor not in ("weight", "bias"):
        return None
    tensors: Any = sys.modules["torch.distributed.tensor"]
    cuts = {name: Cut.of(each) for name, each in module._parameters.items() if each is not None and is_cut(each)}
    one = all(len(each.placements) == 1 for each in cuts.values())
    along = {type(each.placements[0]) for each in cuts.values()} if one else set()
    if not (called and along and along <= {tensors.Shard, tensors.Replicate}):
        raise UnsupportedSite(
            f"a {type(module).__name__} is tensor-parallel in a way that adapters do not support; exclude it, or "
            f"{WHOLE}"
        )
    along_rows = cuts["weight"].placements[0].is_shard(0)
    of_bias = tensors.Shard(0) if along_rows else tensors.Replicate()
    cuts.setdefault("bias", Cut(weight.device_mesh, (of_bias,), weight.shape[:1]))
    return ParallelLinear(cuts=cuts)
