"""Tensor-parallel models, which compute with pieces of their weights: checks which operators are allowed in them, and
gives operators equal initial values in all processes.

For operators that act on weights, the layers gather the weight (`layers.tensor_parallel`). An operator on the input or
output of a layer would get only the piece of this process, so it raises an error before anything changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from peftcore.contract.operators import changes_bias
from peftcore.errors import UnsupportedHost
from peftcore.layers.adapter_modules import AdapterModules
from peftcore.layers.tensor_parallel import ParallelLinear, agree

if TYPE_CHECKING:
    from peftcore.contract.surgeon_protocol import Surgeon

ADVICE = (
    "the model is tensor-parallel: target linear layers that are cut (such as attn.q, attn.v) with a method that acts "
    "on weights, such as lora or dora; or adapt the whole model, merge, then parallelize"
)


def computes_with_pieces(model: nn.Module, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether some parameters of a model are distributed tensors that are not gathered before their use.

    Raises:
        UnsupportedHost: the model is both tensor-parallel and sharded by FSDP2.
    """
    # Looked up, not imported: in a process that never imported torch.distributed.tensor no weight is distributed.
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not any(issubclass(kind, tensors.DTensor) for kind in set(map(type, parameters))):
        return False
    return _is_tensor_parallel(model)


def _is_tensor_parallel(model: nn.Module) -> bool:
    """Whether the model has distributed tensors for another reason than FSDP2, which gathers tensors before each
    use."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if isinstance(model, FSDPModule):
        if any(isinstance(each, DTensor) and _cuts(each) > 1 for each in model.parameters()):
            raise UnsupportedHost(
                "the model is both tensor-parallel and sharded (FSDP2), so its forward computes with pieces of "
                "weights: use only one of the two, or adapt the whole model, merge, then parallelize"
            )
        return False
    own = any(isinstance(parameter, DTensor) for parameter in model._parameters.values())
    children = (child for child in model._modules.values() if child is not None)
    return own or any(_is_tensor_parallel(child) for child in children if not isinstance(child, AdapterModules))


def _cuts(tensor: Any) -> int:
    """Returns the number of mesh dimensions along which a distributed tensor is split."""
    return sum(not placement.is_replicate() for placement in tensor.placements)


@contextmanager
def explaining(method: str) -> Iterator[None]:
    """Context manager that replaces torch's error about distributed tensors by an error with a solution. `method` is
    the name of the method that is recorded.

    Raises:
        UnsupportedHost: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise UnsupportedHost(f"{ADVICE}. Recording {method} failed: {error}") from error


def check_operators(surgeon: Surgeon) -> None:
    """Check that all recorded operators act only on weights, which are gathered for them.

    Raises:
        UnsupportedHost: an operator acts on a module's input or output, or on another tensor of which this process may
            have only a piece.
    """
    for graft in surgeon.grafts:
        for site in graft.holders:
            if site.form != "weight" or not isinstance(site.layer, ParallelLinear):
                where = site.path or "the model"
                raise UnsupportedHost(
                    f"{ADVICE}. {surgeon.method.name} would receive only pieces of tensors at {where}"
                )
            if (site.tensor == "bias" or changes_bias(graft.operator)) and site.layer.adds_bias_late(site.module):
                raise UnsupportedHost(
                    f"the bias of {site.module_path} is added after the outputs of all processes are summed, where "
                    f"{surgeon.method.name} cannot act on it: exclude it, or adapt the whole model, merge, then "
                    "parallelize"
                )


def check_looks_at_no_data(surgeon: Surgeon) -> None:
    """Check that all layers with operators receive whole tensors. For methods that read the inputs of layers before
    training.

    Raises:
        UnsupportedHost: a layer with an operator receives only pieces of tensors.
    """
    if any(graft.site.layer.in_pieces for graft in surgeon.grafts):
        raise UnsupportedHost(f"{ADVICE}. {surgeon.method.name} reads layer inputs, which are only pieces here")


def start_alike(surgeon: Surgeon) -> None:
    """Copy the initial values of the operators from the first process to all others."""
    layers = [graft.site.layer for graft in surgeon.grafts if isinstance(graft.site.layer, ParallelLinear)]
    modules = [*(shared.module for shared in surgeon.owned.values()), *(graft.operator for graft in surgeon.grafts)]
    for module in modules if layers else ():
        agree(module, layers[0])
