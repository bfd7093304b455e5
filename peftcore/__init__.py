"""peftcore: a registry of parameter-efficient fine-tuning methods that anyone extends without touching its core."""

from peftcore.algebra.combining import combine, deltas, to_lora
from peftcore.contract.compositions import Average, Fuse, Split, Stack, Sum
from peftcore.contract.config import MethodConfig
from peftcore.contract.hookspecs import API, hookimpl
from peftcore.contract.method import Method, Tags
from peftcore.contract.operators import (
    Combiner,
    Held,
    Operator,
    Replacement,
    Shared,
    WeightOperator,
    full_precision,
    on_first,
)
from peftcore.files.compositions import load_composition, save_composition
from peftcore.files.save_load import load
from peftcore.forward.attention import Attend, AttentionOperator
from peftcore.forward.context import Call, ForwardContext, Tap, current_call, forward_context
from peftcore.forward.host_state import injections
from peftcore.forward.save_pretrained import saving_base
from peftcore.injection.applied import AppliedMethod, HybridPart
from peftcore.injection.applying import apply, plan
from peftcore.injection.injection import Injection
from peftcore.injection.quantization import dequantize, quantize, schemes
from peftcore.injection.switching import activate, call, route
from peftcore.layers.kernels import cast_operands, dropped_linear, matmul_transposed, runs_plain
from peftcore.layers.layer import Layer
from peftcore.registry.catalogue import MethodInfo, method, methods, register
from peftcore.surgery.planning import Plan
from peftcore.surgery.surgeon import Surgeon
from peftcore.targets.attention_sites import AttentionSite
from peftcore.targets.sequence import SequenceOperator, SequenceSite
from peftcore.targets.sites import Site
from peftcore.training.batches import Batch, Batches
from peftcore.training.optimizer import GradientRule
from peftcore.utils import moved

moved.install()

__version__ = "0.1.0"

__all__ = [
    "API",
    "AppliedMethod",
    "Attend",
    "AttentionOperator",
    "AttentionSite",
    "Average",
    "Batch",
    "Batches",
    "Call",
    "Combiner",
    "ForwardContext",
    "Fuse",
    "GradientRule",
    "Held",
    "HybridPart",
    "Injection",
    "Layer",
    "Method",
    "MethodConfig",
    "MethodInfo",
    "Operator",
    "Plan",
    "Replacement",
    "SequenceOperator",
    "SequenceSite",
    "Shared",
    "Site",
    "Split",
    "Stack",
    "Sum",
    "Surgeon",
    "Tags",
    "Tap",
    "WeightOperator",
    "activate",
    "apply",
    "call",
    "cast_operands",
    "combine",
    "current_call",
    "deltas",
    "dequantize",
    "dropped_linear",
    "forward_context",
    "full_precision",
    "hookimpl",
    "injections",
    "load",
    "load_composition",
    "matmul_transposed",
    "method",
    "methods",
    "on_first",
    "plan",
    "quantize",
    "register",
    "route",
    "runs_plain",
    "save_composition",
    "saving_base",
    "schemes",
    "to_lora",
]
