"""Names that most methods need: for the method, its options, its target modules and its operators."""

from peftcore.contract.batches import Batches
from peftcore.contract.config import MethodConfig, Share
from peftcore.contract.hookspecs import API, hookimpl
from peftcore.contract.installed_methods import AppliedMethod
from peftcore.contract.method import MATRICES, OUTPUTS, LearningRate, Method, Tags
from peftcore.contract.operators import Held, InputOperator, Operator, Shared, WeightOperator, on_first
from peftcore.contract.presets import Preset
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.forward.context.context import ForwardContext, forward_context
from peftcore.forward.context.taps import Tap
from peftcore.targets.sites import Site
from peftcore.utils.autocast import full_precision

__all__ = [
    "API",
    "MATRICES",
    "OUTPUTS",
    "AppliedMethod",
    "Batches",
    "ForwardContext",
    "Held",
    "InputOperator",
    "LearningRate",
    "Method",
    "MethodConfig",
    "Operator",
    "Preset",
    "Share",
    "Shared",
    "Site",
    "Surgeon",
    "Tags",
    "Tap",
    "WeightOperator",
    "forward_context",
    "full_precision",
    "hookimpl",
    "on_first",
]
