"""Names for methods that work on weights in detail: layouts, slices, quantized layers, low-rank factors, gradients,
routers, hybrids."""

from peftcore.algebra import merge_math
from peftcore.authoring.hybrid_parts import OfParts, options_of, without_preset
from peftcore.authoring.inputs import sees_vectors, watched_inputs
from peftcore.contract.calls import Calls
from peftcore.contract.hookspecs import ForcedAttributes
from peftcore.contract.method import GradientRule
from peftcore.contract.operators import (
    Checked,
    Combiner,
    Factors,
    Mine,
    Replacement,
    changes_bias,
    is_mergeable,
    low_rank,
)
from peftcore.contract.surgeon_protocol import Graft
from peftcore.forward.context.routers import Router, by_row
from peftcore.forward.rows.routing import OneForward
from peftcore.forward.tensors.view import with_tensors
from peftcore.injection.applied import HybridPart
from peftcore.injection.quantization import scheme_key
from peftcore.injection.quantized_layer import QuantizedLayer, quantized_layer_of
from peftcore.layers.kernels import dropped_linear, matmul_transposed, runs_plain
from peftcore.layers.kinds import Transposed
from peftcore.layers.layer import Layer, Slices, bias_name
from peftcore.targets.resolver import Resolver
from peftcore.utils.autocast import cast_operands

__all__ = [
    "Calls",
    "Checked",
    "Combiner",
    "Factors",
    "ForcedAttributes",
    "GradientRule",
    "Graft",
    "HybridPart",
    "Layer",
    "Mine",
    "OfParts",
    "OneForward",
    "QuantizedLayer",
    "Replacement",
    "Resolver",
    "Router",
    "Slices",
    "Transposed",
    "bias_name",
    "by_row",
    "cast_operands",
    "changes_bias",
    "dropped_linear",
    "is_mergeable",
    "low_rank",
    "matmul_transposed",
    "merge_math",
    "options_of",
    "quantized_layer_of",
    "runs_plain",
    "scheme_key",
    "sees_vectors",
    "watched_inputs",
    "with_tensors",
    "without_preset",
]
