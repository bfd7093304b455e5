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
    "applying": ("injection.applying",),
    "attention": ("forward.attention",),
    "attention_sites": ("targets.attention_sites",),
    "branches": ("authoring.branches",),
    "calls": ("forward.host_state", "forward.choice", "injection.switching"),
    "catalogue": ("registry.catalogue",),
    "checkpoint": ("files.save_load",),
    "combining": ("algebra.combining",),
    "compositions": ("contract.compositions", "files.compositions"),
    "config": ("contract.config", "registry.catalogue"),
    "contract": ("contract.method", "contract.config", "registry.catalogue"),
    "derived": ("forward.recompute",),
    "envelope": ("files.envelope",),
    "files": ("files.safe_io",),
    "graft": ("forward.class_swap",),
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
    "notices": ("registry.experimental",),
    "operators": ("contract.operators",),
    "packing": ("injection.quantized_layer",),
    "parts": ("authoring.parts",),
    "planning": ("surgery.planning",),
    "plugins": ("registry.plugins",),
    "progress": ("utils.progress",),
    "quantization": ("injection.quantization",),
    "records": ("forward.context",),
    "references": ("authoring.budgets",),
    "rows": ("forward.routing",),
    "saving": ("forward.save_pretrained",),
    "sequence": ("targets.sequence",),
    "sequence_cache": ("targets.sequence_cache",),
    "sequence_masks": ("targets.sequence_masks",),
    "sharding": ("layers.fsdp",),
    "shelf": ("forward.adapter_modules",),
    "sites": ("targets.sites",),
    "slots": ("forward.slot",),
    "stances": ("surgery.forced_attributes",),
    "summary": ("injection.summary",),
    "surgery": ("surgery.surgeon",),
    "targets": ("targets.resolver",),
    "training.callback": ("trainers.callback",),
    "updated": ("forward.expert_updates",),
    "weights": ("layers.layer",),
    "witness": ("surgery.silent_layers",),
}
"""Where the names of an old module are now; of a package, where its modules are. All below ``peftcore``."""
WHOLE = ("hosts", "interop", "kernels")
"""Old packages that moved with the modules in them."""
RENAMED: Mapping[str, str] = {"is_plain": "runs_plain", "narrow": "matmul_transposed"}
"""Old names of what is called otherwise in the new place."""


def names_of(old: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for the names that the old module of that path had.

    Args:
        old: the path below ``peftcore``, such as ``"calls"``.
    """

    def lookup(name: str) -> Any:
        for new in MOVED[old] if not name.startswith("__") else ():
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
    """Finds old modules, asked last of all, so that what is there comes first."""

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
    if not dot or package not in WHOLE:
        return None
    new = f"{MOVED[package][0]}.{rest}"
    return new if importlib.util.find_spec(f"peftcore.{new}") is not None else None


def install() -> None:
    """Let old paths be imported."""
    if not any(isinstance(finder, _Forwarding) for finder in sys.meta_path):
        sys.meta_path.append(_Forwarding())
