"""Models whose parameters are sharded over processes (FSDP2, ZeRO-3): parameters are whole in the forward of the
sharded module, and in pieces outside of it.

Code that reads or writes parameters elsewhere (files, schedules, losses of a method) gathers them with the functions
below, in all processes. This module looks up torch's classes without importing them: if they are not imported, no
tensor is sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import TrainingError
from peftcore.layers.pieces import ALONE, ENGINE, at_hand, cut_like, is_cut, is_partitioned, whole
from peftcore.utils.journal import Journal
from peftcore.utils.variables import holding

MANAGED = "_is_fsdp_managed_module"
"""The attribute that torch sets on each module whose parameters it shards."""


_WHOLE: ContextVar[frozenset[int]] = ContextVar("_WHOLE", default=frozenset())
"""Modules whose parameters are temporarily whole, in the one process that has their values."""


def is_sharded_class(cls: type[nn.Module]) -> bool:
    """Whether a class is the subclass that torch sets on a module when it shards the module's parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and cls.__bases__[0] is fsdp.FSDPModule


def in_group() -> bool:
    """Whether this process is in a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameters of a model are sharded, also while they are gathered. Without a process group the answer
    is False."""
    if not in_group() or id(model) in _WHOLE.get():
        return False
    if any(True for _ in _cut_modules(model)):
        return True
    return any(is_cut(parameter) or is_partitioned(parameter) for parameter in model.parameters())


@contextmanager
def one_writes(model: nn.Module) -> Iterator[bool]:
    """Context manager that yields True in a process that writes the files of a model, otherwise False. If the model is
    sharded, only the first process writes. All processes then leave the block together, after the files are written or
    writing has failed."""
    if not is_sharded(model):
        yield True
        return
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.barrier()


@contextmanager
def whole_from(model: nn.Module, values: Mapping[str, Tensor] | None, wanted: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager in which whole values from a state dict replace the pieces of a sharded model. The process that
    has the state dict can then save the model without the other processes. If `values` is None or lacks some of
    `wanted`, the model does not change."""
    named = model.named_parameters(remove_duplicate=False)
    pieces = {each: name for name, each in named if is_cut(each) or is_partitioned(each)}
    needed = [pieces[each] for each in wanted if each in pieces]
    if values is None or not needed or any(name not in values for name in needed):
        yield
        return
    others = {each: nn.Parameter(values[name], each.requires_grad) for each, name in pieces.items() if name in values}
    there = _WHOLE.get() | {id(module) for module in model.modules()}
    with holding(_WHOLE, there), holding(ALONE, True), standing(model, others):
        yield


StandIns = Mapping[nn.Parameter, nn.Parameter]
"""Maps sharded parameters to the whole parameters that replace them. The whole parameters are always the same objects.
Outside of `gathered` they are empty."""


@contextmanager
def gathered(
    model: nn.Module,
    wanted: Callable[[], Iterable[nn.Parameter]],
    whole_parameters: StandIns | None = None,
    *,
    reads: bool = False,
) -> Iterator[None]:
    """Context manager in which parameters of the model are whole in their modules, with whole gradients. Their values
    are sharded again at the end of the block.

    Args:
        wanted: a function that returns the parameters to gather. It is called when all sharded parameters are in
            pieces.
        whole_parameters: existing parameter objects that receive the whole values; None to create new objects.
        reads: whether the caller only reads the parameters, without gradients.

    Raises:
        TrainingError: DeepSpeed has partitioned the parameters (ZeRO-3), and the caller would write them.
    """
    if not is_sharded(model):
        yield
        return
    _reshard(model)
    if reads:
        with at_hand(wanted()), _whole_of(model, stand_ins_for(wanted())):
            yield
        return
    if any(map(is_partitioned, wanted())):
        raise TrainingError(f"{ENGINE}: use stage 2 for methods with a schedule or an update rule of their own")
    filled = stand_ins_for(wanted()) if whole_parameters is None else whole_parameters
    with _whole_of(model, filled):
        yield
        with torch.no_grad():
            for piece, stand_in in filled.items():
                piece.copy_(cut_like(stand_in.detach(), piece))


@contextmanager
def _whole_of(model: nn.Module, filled: StandIns) -> Iterator[None]:
    """Context manager in which whole parameters replace the sharded parameters, with their gathered values and
    gradients."""
    for piece, stand_in in filled.items():
        stand_in.data = whole(piece.detach())
        stand_in.grad = None if piece.grad is None else whole(piece.grad)
    try:
        with standing(model, filled):
            yield
    finally:
        for stand_in in filled.values():
            stand_in.data, stand_in.grad = stand_in.data.new_empty(0), None


@contextmanager
def loading_whole(model: nn.Module) -> Iterator[None]:
    """Context manager in which ``load_state_dict`` accepts whole values of sharded parameters."""

    def cut(module: nn.Module, state_dict: dict[str, Tensor], *args: Any) -> None:
        for name, piece in module.named_parameters(remove_duplicate=False):
            if name in state_dict and is_cut(piece):
                state_dict[name] = cut_like(state_dict[name], piece)

    _reshard(model)
    handle = model.register_load_state_dict_pre_hook(cut)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def differentiable(model: nn.Module, wanted: Callable[[], Iterable[nn.Parameter]]) -> Iterator[None]:
    """Context manager for code inside a forward. Sharded parameters are whole in it, and gradients flow back to the
    pieces."""
    with standing(model, {piece: whole(piece) for piece in wanted() if is_cut(piece)}):
        yield


def stand_ins_for(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """Returns empty whole parameters for the sharded ones among `parameters`."""
    return {
        piece: nn.Parameter(torch.empty(0, dtype=piece.dtype, device=piece.device), piece.requires_grad)
        for piece in parameters
        if is_cut(piece)
    }


@contextmanager
def standing(model: nn.Module, others: Mapping[nn.Parameter, Any]) -> Iterator[None]:
    """Context manager in which other tensors replace parameters of the model. `others` maps each parameter to its
    replacement."""
    with Journal(temporary=True) as journal:
        for module in model.modules() if others else ():
            for name, held in module._parameters.items():
                if held is not None and held in others:
                    journal.put(module, "_parameters", name, others[held])
        yield


def hold_whole(model: nn.Module) -> None:
    """Gather the outermost module's own parameters, as in its forward, for calls of modules inside it.

    Inner modules that are sharded separately gather their parameters in their own forward.
    """
    outermost: Any = model
    if any(each is model for each in _cut_modules(model)):
        outermost.unshard()


def in_pieces(model: nn.Module) -> None:
    """Shard the parameters of a model again in all modules that hold them whole."""
    if is_sharded(model):
        _reshard(model)


def _reshard(model: nn.Module) -> None:
    """Shard the parameters of all modules again. (The outermost module keeps its parameters whole after a forward, for
    backward.)"""
    for module in _cut_modules(model):
        module.reshard()


def _cut_modules(model: nn.Module) -> Iterator[Any]:
    """Returns the modules that gather their parameters before their forward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (each for each in (model.modules() if fsdp else ()) if fsdp and isinstance(each, fsdp.FSDPModule))
