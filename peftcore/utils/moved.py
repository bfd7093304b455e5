"""Old paths of modules, which go on to work for one minor version: each import of one says where its names are now."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

MOVED: Mapping[str, tuple[str, ...]] = {
    "algebra": ("algebra.merge_math",),
    "applying": ("injection.applying", "injection.arguments", "injection.recording", "injection.establishing"),
    "attention": ("forward.attention",),
    "attention_sites": ("targets.attention_sites",),
    "branches": ("authoring.branches",),
    "calls": ("forward.host_state", "forward.active_adapters", "injection.switching"),
    "catalogue": ("registry.catalogue",),
    "checkpoint": ("files.save_load",),
    "cli.comparing": ("comparing.comparisons",),
    "cli.comparing.compare": (
        "comparing.comparisons.compare",
        "comparing.comparisons.comparison",
    ),
    "cli.comparing.curves": ("comparing.reports.curves",),
    "cli.comparing.html": ("comparing.reports.html",),
    "cli.comparing.labels": ("comparing.reports.labels",),
    "cli.comparing.plots": ("comparing.reports.plots",),
    "cli.comparing.report": (
        "comparing.reports.files",
        "cli.printing.comparison",
    ),
    "cli.comparing.summary": ("comparing.reports.summary",),
    "cli.comparing.svg": ("comparing.reports.svg",),
    "cli.comparing.trials": (
        "comparing.reports.trials",
        "comparing.runs.run",
    ),
    "cli.errors": (
        "comparing.errors",
        "comparing.packages",
    ),
    "cli.looking.costs": ("comparing.plans.costs",),
    "cli.looking.quiet": ("comparing.quiet",),
    "cli.looking.recorded": ("comparing.plans.recorded",),
    "cli.models": ("comparing.models",),
    "cli.models.activations": ("comparing.models.activations",),
    "cli.models.example_inputs": ("comparing.models.example_inputs",),
    "cli.models.files": ("comparing.models.files",),
    "cli.models.loading": ("comparing.models.loading",),
    "cli.models.opening": ("comparing.models.opening",),
    "cli.models.skeletons": ("comparing.models.skeletons",),
    "cli.numbers": ("comparing.numbers",),
    "cli.output": (
        "cli.adapters.output",
        "comparing.runs.folder",
    ),
    "cli.searching": ("comparing.searching",),
    "cli.searching.budget": ("comparing.searching.budget",),
    "cli.searching.found": (
        "comparing.searching.found",
        "cli.printing.search",
    ),
    "cli.searching.search": ("comparing.searching.search",),
    "cli.searching.space": ("comparing.searching.space",),
    "cli.searching.studies": ("comparing.searching.studies",),
    "cli.tasks": ("comparing.tasks.catalogue",),
    "cli.tasks._causal": ("comparing.tasks._causal",),
    "cli.tasks._classes": ("comparing.tasks._classes",),
    "cli.tasks._language": ("comparing.tasks._language",),
    "cli.tasks.causal_lm": ("comparing.tasks.causal_lm",),
    "cli.tasks.chat": ("comparing.tasks.chat",),
    "cli.tasks.image_classification": ("comparing.tasks.image_classification",),
    "cli.tasks.seq2seq": ("comparing.tasks.seq2seq",),
    "cli.tasks.task": ("comparing.tasks.task",),
    "cli.tasks.text_classification": ("comparing.tasks.text_classification",),
    "cli.tasks.text_to_image": ("comparing.tasks.text_to_image",),
    "cli.tasks.token_classification": ("comparing.tasks.token_classification",),
    "cli.training": ("comparing.training",),
    "cli.training.data": (
        "comparing.data.texts",
        "comparing.data.tables",
        "comparing.data.columns",
    ),
    "cli.training.demo": ("comparing.comparisons.demo",),
    "cli.training.memory": ("comparing.training.memory",),
    "cli.training.processes": ("comparing.training.processes",),
    "cli.training.progress": ("cli.printing.progress",),
    "cli.training.run_folder": ("comparing.runs.folder",),
    "cli.training.runs": (
        "comparing.runs.run",
        "comparing.runs.reading",
    ),
    "cli.training.sources": ("comparing.data.sources",),
    "cli.training.train": (
        "comparing.training.train",
        "cli.printing.run",
    ),
    "cli.training.trainer": ("comparing.training.trainer",),
    "cli.training.tuning": ("comparing.data.tuning",),
    "combining": ("algebra.combining",),
    "compositions": ("contract.compositions", "files.compositions"),
    "config": ("contract.config", "registry.catalogue"),
    "contract": ("contract.method", "contract.config", "registry.catalogue"),
    "derived": ("forward.recompute",),
    "envelope": ("files.envelope",),
    "files": ("files.safe_io",),
    "graft": ("forward.class_swap", "forward.run", "forward.view", "forward.slot"),
    "hookspecs": ("contract.hookspecs",),
    "hosts": ("roles",),
    "injection": ("injection.injection",),
    "installation": ("surgery.installation",),
    "interop": ("files.formats",),
    "interop.formats": ("files.formats.format",),
    "kept": ("forward.cache",),
    "kernels": ("layers.kernels",),
    "layers": ("layers.detect",),
    "merging": ("injection.merging",),
    "mounts": ("forward.mount",),
    "notices": ("registry.equation_only",),
    "operators": ("contract.operators", "utils.autocast"),
    "packing": ("injection.quantized_layer",),
    "parts": ("authoring.hybrid_parts",),
    "planning": ("surgery.planning",),
    "plugins": ("registry.plugins",),
    "progress": ("utils.progress",),
    "quantization": ("injection.quantization",),
    "records": ("forward.context", "forward.taps", "forward.recorder"),
    "references": ("authoring.budgets",),
    "rows": ("forward.routing", "forward.batched_updates"),
    "saving": ("forward.save_pretrained",),
    "sequence": ("targets.sequence",),
    "sequence_cache": ("targets.sequence_cache",),
    "sequence_masks": ("targets.sequence_masks",),
    "sharding": ("layers.fsdp",),
    "shelf": ("forward.adapter_modules",),
    "sites": ("targets.sites",),
    "slots": ("forward.slot", "forward.plan"),
    "stances": ("surgery.forced_attributes",),
    "summary": ("injection.summary",),
    "surgery": ("surgery.surgeon", "surgery.seeding"),
    "targets": ("targets.resolver",),
    "training.callback": ("trainers.callback",),
    "updated": ("forward.expert_updates",),
    "weights": ("layers.layer", "layers.kinds"),
    "witness": ("surgery.silent_layers",),
}
"""Where the names of an old module are now; of a package, where its modules are. All below ``peftcore``."""
WHOLE = ("hosts", "interop", "kernels")
"""Old packages that moved with the modules in them."""
RENAMED: Mapping[str, str] = {
    "Packed": "QuantizedLayer",
    "Ranges": "Slices",
    "STANCES": "FORCED_ATTRIBUTES",
    "Stance": "ForcedAttributes",
    "become": "replace_in_place",
    "is_plain": "runs_plain",
    "narrow": "matmul_transposed",
    "packed_layer": "quantized_layer_of",
}
"""Old names of objects that have another name in the new place."""


def names_of(old: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for the names that the old module of that path had.

    Args:
        old: the path below ``peftcore``, such as ``"calls"``.
    """

    def lookup(name: str) -> Any:
        inner = importlib.util.find_spec(f"peftcore.{old}.{name}") if not name.startswith("__") else None
        for new in (
            MOVED[old] if not name.startswith("__") and inner is None else ()
        ):  # its own modules are no old names
            module = importlib.import_module(f"peftcore.{new}")
            now = RENAMED.get(name, name)
            if now in vars(module):
                warnings.warn(
                    f"peftcore.{old}.{name} is peftcore.{new}.{now} now; the old path goes with the next minor version",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return vars(module)[now]
        raise AttributeError(f"module 'peftcore.{old}' has no attribute {name!r}")

    return lookup


class _Forwarding(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds old modules; asked last, so that existing modules come first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        old = fullname.removeprefix("peftcore.")
        known = old in MOVED or _inside(old) is not None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix("peftcore.")
        inside = _inside(old)
        if old not in MOVED and inside is not None:  # a module of a package that moved as a whole
            sys.modules[module.__name__] = importlib.import_module(f"peftcore.{inside}")
        else:
            vars(module)["__getattr__"] = names_of(old)


def _inside(old: str) -> str | None:
    """The new path of a module of a package that moved as a whole; None where there is none."""
    package, dot, rest = old.partition(".")
    if not dot or package not in WHOLE or old.rpartition(".")[0] in MOVED.keys() - set(WHOLE):
        return None
    new = f"{MOVED[package][0]}.{rest}"
    return new if importlib.util.find_spec(f"peftcore.{new}") is not None else None


def install() -> None:
    """Let old paths be imported."""
    if not any(isinstance(finder, _Forwarding) for finder in sys.meta_path):
        sys.meta_path.append(_Forwarding())
