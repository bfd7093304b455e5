"""Runs in several processes: the arguments with which accelerate and the Trainer shard the weights (FSDP2)."""

from __future__ import annotations

import os
from typing import Any

import transformers
from accelerate import Accelerator, DistributedType
from torch import nn

from peftcore.author.formats import host_map, layer_of
from peftcore.errors import BadInput

ASKED = "ACCELERATE_USE_FSDP"
"""The environment variable that ``accelerate launch --use_fsdp`` sets."""


def sharding_arguments(wanted: bool) -> dict[str, Any]:
    """Return the arguments for sharding in the Trainer; empty if there is only one process or sharding is not
    wanted."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return {"fsdp": True, "fsdp_config": {"version": 2}} if wanted and several else {}


def is_sharded_run(wanted: bool) -> bool:
    """Return whether the weights are sharded over processes, because of the run's option or of accelerate's
    launcher."""
    return bool(sharding_arguments(wanted)) or _launched()


def _launched() -> bool:
    return os.environ.get(ASKED, "false").lower() == "true"


def ask_for_sharding(args: transformers.TrainingArguments) -> None:
    """Make accelerate shard the weights, if the arguments or its launcher request it, also for processes without a GPU.

    Raises:
        BadInput: the sharding is FSDP1, whose flat parameters are not supported.
    """
    launched = _launched()
    if launched and not args.fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise BadInput("sharding needs FSDP2, and accelerate launch asks for FSDP1: add --fsdp_version 2 to it")
    state = args.distributed_state
    if (launched or args.fsdp) and state is not None and state.distributed_type is DistributedType.MULTI_CPU:
        # It would leave them unsharded, without a word, though gloo can do it. Of this it makes FSDP; the device stays.
        state.distributed_type = DistributedType.MULTI_GPU


def settle_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Configure accelerate to shard the weights block by block, unless its own options set another way.

    Raises:
        BadInput: several modules share an embedding, which accelerate would shard twice.
        UnsupportedHost: the model is quantized in a format that cannot be sharded.
    """
    if accelerator.distributed_type is not DistributedType.FSDP:
        return
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    _check_embeddings(model)
    check_cut(model)
    plugin = accelerator.state.fsdp_plugin
    # Every process has read the weights, and accelerate's way of handing them on fails where a model has buffers.
    plugin.cpu_ram_efficient_loading = False
    if plugin.transformer_cls_names_to_wrap is None and plugin.auto_wrap_policy is not size_based_auto_wrap_policy:
        # Not what a model of transformers calls its parts: among those one may hold another that accelerate cuts too.
        blocks = [entry.path for entry in host_map(model).entries if entry.role == "block"]
        plugin.transformer_cls_names_to_wrap = sorted({type(model.get_submodule(path)).__name__ for path in blocks})
        plugin.auto_wrap_policy = transformer_auto_wrap_policy


def check_cut(model: nn.Module) -> None:
    """Check that the weights can be sharded over processes, including quantized ones.

    Raises:
        UnsupportedHost: a weight cannot be sharded.
    """
    for module in model.modules():
        layer_of(module, "weight").check_cut(module)


def _check_embeddings(model: nn.Module) -> None:
    if not isinstance(model, transformers.PreTrainedModel):
        return
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    table = next(embeddings[0].parameters())
    holders = [path for path, each in model.named_modules() if each._parameters.get("weight") is table]
    if any(model.get_submodule(path) not in embeddings for path in holders):
        raise BadInput(
            f"{', '.join(holders)} share one weight, which accelerate would shard twice: train without sharding, so "
            "that every process holds the whole model"
        )
