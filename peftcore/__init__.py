"""peftcore: a registry of parameter-efficient fine-tuning methods that anyone extends without touching its core."""

from peftcore.applying import apply, plan
from peftcore.calls import activate, injections
from peftcore.catalogue import method, methods, register
from peftcore.checkpoint import load
from peftcore.contract import Method, MethodConfig, MethodInfo, Tags
from peftcore.hookspecs import API, hookimpl
from peftcore.injection import Injection
from peftcore.operators import Operator, Replacement, WeightOperator, on_first
from peftcore.planning import Plan
from peftcore.surgery import Surgeon
from peftcore.targets import Site

__version__ = "0.1.0"

__all__ = [
    "API",
    "Injection",
    "Method",
    "MethodConfig",
    "MethodInfo",
    "Operator",
    "Plan",
    "Replacement",
    "Site",
    "Surgeon",
    "Tags",
    "WeightOperator",
    "activate",
    "apply",
    "hookimpl",
    "injections",
    "load",
    "method",
    "methods",
    "on_first",
    "plan",
    "register",
]
