"""peftcore: a registry of parameter-efficient fine-tuning methods that anyone extends without touching its core."""

from peftcore.applying import apply, plan
from peftcore.attention import Attend, AttentionOperator
from peftcore.attention_sites import AttentionSite
from peftcore.calls import activate, call, injections, route
from peftcore.catalogue import method, methods, register
from peftcore.checkpoint import load
from peftcore.combining import combine, deltas, to_lora
from peftcore.compositions import (
    Average,
    Fuse,
    Split,
    Stack,
    Sum,
    load_composition,
    save_composition,
)
from peftcore.contract import Method, MethodConfig, MethodInfo, Tags
from peftcore.hookspecs import API, hookimpl
from peftcore.injection import Injection
from peftcore.kernels import cast_operands, dropped_linear, matmul_transposed, runs_plain
from peftcore.operators import (
    Combiner,
    Held,
    Operator,
    Replacement,
    Shared,
    WeightOperator,
    full_precision,
    on_first,
)
from peftcore.planning import Plan
from peftcore.quantization import dequantize, quantize, schemes
from peftcore.records import Call, Tap, current_call
from peftcore.saving import saving_base
from peftcore.sequence import SequenceOperator, SequenceSite
from peftcore.sites import Site
from peftcore.surgery import Surgeon
from peftcore.training.batches import Batch, Batches
from peftcore.training.optimizer import GradientRule
from peftcore.weights import Layer

__version__ = "0.1.0"

__all__ = [
    "API",
    "Attend",
    "AttentionOperator",
    "AttentionSite",
    "Average",
    "Batch",
    "Batches",
    "Call",
    "Combiner",
    "Fuse",
    "GradientRule",
    "Held",
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
