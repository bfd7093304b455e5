"""One run in several processes: how accelerate and the Trainer are told to cut the weights over them (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.optim import Optimizer

from peftcore.applying import host_map
from peftcore.cli.errors import BadInput
from peftcore.sharding import cut_like, is_cut, whole

ASKED = "ACCELERATE_USE_FSDP"
"""What ``accelerate launch --use_fsdp`` sets."""


def sharding_arguments(wanted: bool) -> dict[str, Any]:
    """Arguments of the Trainer; one process has nothing to cut."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return {"fsdp": True, "fsdp_config": {"version": 2}} if wanted and several else {}


def shard_on_cpu(args: transformers.TrainingArguments) -> None:
    """accelerate leaves processes without a device of their own unsharded, without a word, though gloo can do it."""
    state = args.distributed_state
    asked = args.fsdp or os.environ.get(ASKED, "false").lower() == "true"
    if asked and state is not None and state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # of which it makes FSDP; the device stays


def settle_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """See that the weights will be cut in a way in which adapters can be trained, block by block.

    Raises:
        BadInput: this is FSDP1.
    """
    if accelerator.distributed_type is not DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise BadInput(
            "adapters train with FSDP2 alone: add --fsdp_version 2 to accelerate launch, or set FSDP_VERSION=2"
        )
    # Every process has read the weights, and accelerate's way of handing them on fails where a model has buffers.
    plugin.cpu_ram_efficient_loading = False
    if plugin.transformer_cls_names_to_wrap is None and plugin.auto_wrap_policy is not size_based_auto_wrap_policy:
        # Not what a model of transformers calls its parts: among those one may hold another that accelerate cuts too.
        blocks = [entry.path for entry in host_map(model).entries if entry.role == "block"]
        plugin.transformer_cls_names_to_wrap = sorted({type(model.get_submodule(path)).__name__ for path in blocks})
        plugin.auto_wrap_policy = transformer_auto_wrap_policy


@contextmanager
def whole_state(optimizer: Optimizer) -> Iterator[None]:
    """Until the end of the block, what an optimizer remembers is not cut over processes."""
    pieces = [(held, key, each) for held, key, each in _tensors(optimizer) if is_cut(each)]
    for held, key, each in pieces:
        held[key] = whole(each)
    try:
        yield
    finally:
        for held, key, each in pieces:
            held[key] = each


def cut_state(optimizer: Optimizer) -> None:
    """What an optimizer remembers of parameters that are cut, in the same pieces."""
    for parameter, held in optimizer.state.items():
        for key, each in held.items():
            if is_cut(parameter) and isinstance(each, Tensor) and each.shape == parameter.shape:
                held[key] = cut_like(each, parameter)


def _tensors(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for held in optimizer.state.values():
        yield from ((held, key, each) for key, each in held.items() if isinstance(each, Tensor))
