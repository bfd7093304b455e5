"""peftcore: a registry of parameter-efficient fine-tuning methods. Anyone can extend it by plugins, without changes of
its core.

Users import from this package; authors of methods import from `peftcore.author`.
"""

import importlib
import warnings
from importlib.util import find_spec

from peftcore.algebra.adapters_as_parts import gather
from peftcore.algebra.combining import combine, deltas, lora_of, to_lora
from peftcore.contract.batches import Batch, Labelled
from peftcore.contract.compositions import Average, Fuse, Split, Stack, Sum
from peftcore.files.adapter_pool import AdapterPool, keep_within
from peftcore.files.bases import load_base
from peftcore.files.composition_folders import load_composition, save_composition
from peftcore.files.save_load import load
from peftcore.forward.state.cached_weights import cache_weights
from peftcore.injection.applying import apply, plan
from peftcore.injection.injection import Injection, injections
from peftcore.injection.quantization import Scheme, dequantize, quantize, round_trip, scheme, schemes
from peftcore.injection.replicated_layers import replicate_layers
from peftcore.injection.switching import activate, call, route, using
from peftcore.libraries.save_pretrained import saving_base
from peftcore.registry.catalogue import MethodInfo, method, methods, register
from peftcore.roles import HostEntry, HostMap
from peftcore.surgery.planning import Plan

__version__ = "0.1.0"

__all__ = [
    "AdapterPool",
    "Average",
    "Batch",
    "Fuse",
    "HostEntry",
    "HostMap",
    "Injection",
    "Labelled",
    "MethodInfo",
    "Plan",
    "Scheme",
    "Split",
    "Stack",
    "Sum",
    "activate",
    "apply",
    "author",
    "cache_weights",
    "call",
    "combine",
    "compare",
    "deltas",
    "dequantize",
    "gather",
    "injections",
    "keep_within",
    "load",
    "load_base",
    "load_composition",
    "lora_of",
    "method",
    "methods",
    "plan",
    "quantize",
    "register",
    "replicate_layers",
    "round_trip",
    "route",
    "save_composition",
    "saving_base",
    "scheme",
    "schemes",
    "to_lora",
    "using",
]


if find_spec("peftcore_lab") is None:
    __all__.remove("compare")


def __dir__() -> list[str]:
    """Return the names of the public API. Submodules that are attributes of the package after an import are not part of
    it."""
    return sorted(__all__)


def __getattr__(name: str) -> object:
    """Return an attribute that is imported on first use: the module `author`, or `compare` from the distribution
    peftcore-lab. Names that have moved from here to `peftcore.author` are returned too, with a warning.

    Raises:
        MissingPackage: the attribute is `compare`, and peftcore-lab is not installed.
    """
    if name == "compare":
        if find_spec("peftcore_lab") is None:
            from peftcore.utils.packages import lab_is_missing

            raise lab_is_missing("peftcore.compare")
        from peftcore_lab.comparisons.modules import compare

        return compare
    if not name.startswith("_"):
        author = importlib.import_module("peftcore.author")
        if name == "author":
            return author
        if name in author.__all__:
            text = f"peftcore.{name} has moved: import {name} from peftcore.author"
            warnings.warn(text, FutureWarning, stacklevel=2)
            return getattr(author, name)
    raise AttributeError(f"module 'peftcore' has no attribute {name!r}")
