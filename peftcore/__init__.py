"""peftcore: a registry of parameter-efficient fine-tuning methods that anyone extends without touching its core."""

from importlib.util import find_spec

from peftcore.algebra import merge_math
from peftcore.algebra.adapters_as_parts import gather
from peftcore.algebra.combining import combine, deltas, lora_of, to_lora
from peftcore.authoring.blocks import (
    MIXERS,
    BlockSite,
    block_around,
    block_depths,
    block_sites,
    stack_path,
    stream_width,
    with_blocks,
)
from peftcore.authoring.borrowed_layers import BorrowedLayer, borrow
from peftcore.authoring.branches import (
    AtBranchEnd,
    BranchSite,
    Bypass,
    Joins,
    branch,
    branch_end,
    is_post_norm,
    reads_stream,
)
from peftcore.authoring.feed_forwards import FeedForwardSite, feed_forward_around
from peftcore.authoring.guests import GuestNetwork, GuestOperator, guest_network
from peftcore.authoring.hybrid_parts import OfParts, options_of, without_preset
from peftcore.authoring.inputs import sees_vectors, watched_inputs
from peftcore.authoring.instance_prompts import InstanceOperator
from peftcore.authoring.pass_cache import PassCache
from peftcore.authoring.prompts import PromptPositions, TokenStacks, VisibleTokens, cached_tokens
from peftcore.authoring.row_logits import head_sites, row_logits
from peftcore.authoring.streams import RowStream, StreamSite, Turn, add_stream, stream_sites
from peftcore.contract.calls import Calls
from peftcore.contract.compositions import Average, Fuse, Split, Stack, Sum
from peftcore.contract.config import MethodConfig
from peftcore.contract.hookspecs import API, hookimpl
from peftcore.contract.method import MATRICES, OUTPUTS, LearningRate, Method, Tags
from peftcore.contract.operators import (
    Checked,
    Combiner,
    Factors,
    Held,
    InputOperator,
    Mine,
    Operator,
    Replacement,
    Shared,
    WeightOperator,
    changes_bias,
    is_mergeable,
    low_rank,
    on_first,
)
from peftcore.contract.presets import Preset
from peftcore.files.adapter_pool import AdapterPool, keep_within
from peftcore.files.bases import load_base
from peftcore.files.compositions import load_composition, save_composition
from peftcore.files.save_load import load
from peftcore.forward.attention import Attend, AttentionOperator
from peftcore.forward.cached_weights import cache_weights
from peftcore.forward.context import ForwardContext, forward_context
from peftcore.forward.host_state import injections
from peftcore.forward.routers import Router, by_row
from peftcore.forward.routing import OneForward
from peftcore.forward.save_pretrained import saving_base
from peftcore.forward.taps import Tap
from peftcore.forward.tokens import Tokens
from peftcore.forward.view import with_tensors
from peftcore.injection.applied import AppliedMethod, HybridPart
from peftcore.injection.applying import apply, plan
from peftcore.injection.injection import Injection
from peftcore.injection.quantization import Scheme, dequantize, quantize, round_trip, scheme, scheme_key, schemes
from peftcore.injection.quantized_layer import QuantizedLayer, quantized_layer_of
from peftcore.injection.replicated_layers import replicate_layers
from peftcore.injection.switching import activate, call, route, using
from peftcore.layers.kernels import dropped_linear, matmul_transposed, runs_plain
from peftcore.layers.kinds import Transposed
from peftcore.layers.layer import Layer, Slices, bias_name
from peftcore.registry.catalogue import MethodInfo, method, methods, register
from peftcore.roles import HostEntry, HostMap
from peftcore.roles.stacks import TokenStack, cache_in
from peftcore.surgery.forced_attributes import ForcedAttributes
from peftcore.surgery.planning import Plan
from peftcore.surgery.surgeon import Graft, Surgeon
from peftcore.targets.attention_sites import AttentionSite
from peftcore.targets.resolver import Resolver
from peftcore.targets.sequence import Rows, SequenceOperator, SequenceSite
from peftcore.targets.sequence_cache import self_attention_cache
from peftcore.targets.sequence_inside import InnerRows, InnerSite
from peftcore.targets.sites import Site
from peftcore.training.batches import Batch, Batches, Labelled
from peftcore.training.optimizer import GradientRule
from peftcore.utils.autocast import cast_operands, full_precision

__version__ = "0.1.0"

__all__ = [
    "API",
    "MATRICES",
    "MIXERS",
    "OUTPUTS",
    "AdapterPool",
    "AppliedMethod",
    "AtBranchEnd",
    "Attend",
    "AttentionOperator",
    "AttentionSite",
    "Average",
    "Batch",
    "Batches",
    "BlockSite",
    "BorrowedLayer",
    "BranchSite",
    "Bypass",
    "Calls",
    "Checked",
    "Combiner",
    "Factors",
    "FeedForwardSite",
    "ForcedAttributes",
    "ForwardContext",
    "Fuse",
    "GradientRule",
    "Graft",
    "GuestNetwork",
    "GuestOperator",
    "Held",
    "HostEntry",
    "HostMap",
    "HybridPart",
    "Injection",
    "InnerRows",
    "InnerSite",
    "InputOperator",
    "InstanceOperator",
    "Joins",
    "Labelled",
    "Layer",
    "LearningRate",
    "Method",
    "MethodConfig",
    "MethodInfo",
    "Mine",
    "OfParts",
    "OneForward",
    "Operator",
    "PassCache",
    "Plan",
    "Preset",
    "PromptPositions",
    "QuantizedLayer",
    "Replacement",
    "Resolver",
    "Router",
    "RowStream",
    "Rows",
    "Scheme",
    "SequenceOperator",
    "SequenceSite",
    "Shared",
    "Site",
    "Slices",
    "Split",
    "Stack",
    "StreamSite",
    "Sum",
    "Surgeon",
    "Tags",
    "Tap",
    "TokenStack",
    "TokenStacks",
    "Tokens",
    "Transposed",
    "Turn",
    "VisibleTokens",
    "WeightOperator",
    "activate",
    "add_stream",
    "apply",
    "bias_name",
    "block_around",
    "block_depths",
    "block_sites",
    "borrow",
    "branch",
    "branch_end",
    "by_row",
    "cache_in",
    "cache_weights",
    "cached_tokens",
    "call",
    "cast_operands",
    "changes_bias",
    "combine",
    "compare",
    "deltas",
    "dequantize",
    "dropped_linear",
    "feed_forward_around",
    "forward_context",
    "full_precision",
    "gather",
    "guest_network",
    "head_sites",
    "hookimpl",
    "injections",
    "is_mergeable",
    "is_post_norm",
    "keep_within",
    "load",
    "load_base",
    "load_composition",
    "lora_of",
    "low_rank",
    "matmul_transposed",
    "merge_math",
    "method",
    "methods",
    "on_first",
    "options_of",
    "plan",
    "quantize",
    "quantized_layer_of",
    "reads_stream",
    "register",
    "replicate_layers",
    "round_trip",
    "route",
    "row_logits",
    "runs_plain",
    "save_composition",
    "saving_base",
    "scheme",
    "scheme_key",
    "schemes",
    "sees_vectors",
    "self_attention_cache",
    "stack_path",
    "stream_sites",
    "stream_width",
    "to_lora",
    "using",
    "watched_inputs",
    "with_blocks",
    "with_tensors",
    "without_preset",
]


if find_spec("peftcore_lab") is None:
    __all__.remove("compare")


def __dir__() -> list[str]:
    """The public API: modules that imports leave here are not part of it."""
    return sorted(__all__)


def __getattr__(name: str) -> object:
    """Return `compare`, which is in the distribution peftcore-lab and imported when it is first asked for.

    Raises:
        MissingPackage: peftcore-lab is not installed.
    """
    if name == "compare":
        if find_spec("peftcore_lab") is None:
            from peftcore.utils.packages import lab_is_missing

            raise lab_is_missing("peftcore.compare")
        from peftcore_lab.comparisons.modules import compare

        return compare
    raise AttributeError(f"module 'peftcore' has no attribute {name!r}")
