"""Quantizing a host's linear layers: the contract of a scheme, and `quantize`.

A plugin defines a scheme with three hooks: `peftcore_schemes` names it, `peftcore_layer` recognizes its modules, and
the `QuantizedLayer` that it returns reads and packs their weights. Methods and schemes do not depend on each other.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from peftcore.contract.operators import _Base
from peftcore.errors import QuantizationError, TargetError, UnsupportedSite
from peftcore.forward.state.slot import slot_of
from peftcore.injection.fold_parametrizations import fold
from peftcore.injection.quantized_layer import QuantizedLayer, dense_linear, floating_dtype, replace_in_place
from peftcore.injection.request import host_map
from peftcore.layers.adapter_modules import IDLE, AdapterModules
from peftcore.layers.computed_tensors import computation, has_place, parametrized, resting
from peftcore.layers.kinds import Linear
from peftcore.layers.model_locks import changing
from peftcore.libraries.save_pretrained import check_readable, note_form
from peftcore.registry.plugins import imported, layer_of, named_places
from peftcore.targets.resolver import Resolver, Target
from peftcore.targets.sites import Site
from peftcore.utils.device_memory import check_room, totals
from peftcore.utils.journal import Journal
from peftcore.utils.notices import notice
from peftcore.utils.progress import Progress

M = TypeVar("M", bound=nn.Module)
MERGED = "an injection is merged into these weights; bake() it, or unmerge() it first"


class Scheme(BaseModel):
    """A scheme for packing the weight of a linear layer, with its options as fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    layer: ClassVar[QuantizedLayer]
    """The layer that reads the modules of `module`."""
    requires: ClassVar[tuple[str, ...]] = ()
    """The packages that it needs, by import name."""
    extra: ClassVar[str] = ""
    """The pip requirement that installs them."""

    @classmethod
    def missing(cls) -> list[str]:
        """Returns the required packages that are not installed."""
        return [package for package in cls.requires if importlib.util.find_spec(package) is None]

    def module(self, weight: Tensor) -> nn.Module:
        """Returns a linear layer without bias that holds the weight ``[out, in]`` packed.

        Raises:
            QuantizationError: the weight does not fit the format.
        """
        raise NotImplementedError


def schemes() -> dict[str, str]:
    """Returns the names of the schemes of all plugins, each with the import path of its class.

    Raises:
        PluginError: two plugins have a scheme with the same name.
    """
    return named_places("peftcore_schemes", "scheme")


def scheme_class(name: str) -> type[Scheme]:
    """Returns the class of a scheme by name, whether or not its packages are installed.

    Raises:
        QuantizationError: no plugin has a scheme with this name.
    """
    known = schemes()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        there = ", ".join(sorted(known)) or "none (pip install peftcore-quantized)"
        raise QuantizationError(f"no scheme named {name!r}{hint}; there are: {there}")
    cls: type[Scheme] = imported(known[name])
    return cls


def scheme(name: str, **options: Any) -> Scheme:
    """Returns a scheme by name, with its options.

    Raises:
        QuantizationError: no plugin has a scheme with this name, an option is wrong, or a package is missing. The
            message says what to do.
    """
    cls = scheme_class(name)
    missing = cls.missing()
    if missing:
        raise QuantizationError(f"scheme {name!r} needs {' and '.join(missing)}: pip install '{cls.extra}'")
    try:
        return cls(**options)
    except ValidationError as error:
        lines = [f"{name}: {'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise QuantizationError("\n".join([*lines, f"its options: {', '.join(cls.model_fields) or 'none'}"])) from None


@functools.cache
def _scheme(key: str) -> Scheme:
    name, options = json.loads(key)
    return scheme(name, **options)


def scheme_key(name: str, options: Mapping[str, Any]) -> str:
    """Returns a string that encodes a scheme and its options, for `round_trip`.

    Raises:
        QuantizationError: as in `scheme`.
    """
    key = json.dumps([name, dict(options)], sort_keys=True)
    _scheme(key)
    return key


@torch.library.custom_op("peftcore::round_trip", mutates_args=(), schema="(Tensor weight, str key) -> Tensor")
def _round_trip(weight: Tensor, key: str) -> Tensor:
    chosen = _scheme(key)
    return chosen.layer.unpack(chosen.module(weight.contiguous())).to(weight.dtype, copy=True)


@_round_trip.register_fake
def _(weight: Tensor, key: str) -> Tensor:
    return torch.empty_like(weight)


_round_trip.register_autograd(lambda ctx, grad: (grad, None))


def round_trip(weight: Tensor, key: str) -> Tensor:
    """Returns a matrix ``[out, in]`` after packing and unpacking it with a scheme; `key` is the result of `scheme_key`.
    The gradient passes through unchanged (straight-through).

    It is one custom operator of torch, so compilers do not trace into it.

    Raises:
        QuantizationError: the weight does not fit the format.
    """
    rounded: Tensor = _round_trip(weight, key)
    return rounded


def quantize(model: M, name: str, *, target: Target | None = None, exclude: Target | None = None, **options: Any) -> M:
    """Quantize a host's linear layers in place; all of them, or none on an error.

    Modules stay the same objects. Installed injections stay active; methods for quantized bases (LoftQ and similar)
    choose the weight that is packed.

    Args:
        model: the host. Layers that are already quantized are skipped.
        name: a scheme: "nf4", "int8", "bnb-nf4", … (`peftcore.schemes()` lists those of the plugins).
        target: layers to quantize, in the forms of `apply`; by default every linear layer inside the blocks (the role
            "all-linear"); in a host without such roles, every linear layer. Stacked experts stay dense; the logger
            "peftcore" reports this once.
        exclude: targets to leave dense.
        options: the scheme's options.

    Raises:
        QuantizationError: the scheme is unknown, a package is missing, or a weight does not fit the format.
        TargetError: the target has no dense linear layer.
        UnsupportedSite: the target includes a module that is not a linear layer.

    After an error nothing is changed.
    """
    chosen = scheme(name, **options)
    with changing(model):
        sites = list(_sites(model, target, exclude))
        progress, packed = Progress(f"packing as {name}"), []
        progress.expect(len(sites))
        try:
            for site in sites:
                packed.append(chosen.module(_to_pack(site)).train(site.module.training))
                progress.step()
        finally:
            progress.close()
        with Journal() as journal:
            for site, new in zip(sites, packed, strict=True):
                if computation(site.module, "weight") is not None:  # packed with the value that it has now
                    fold(journal, site.module, "weight", nn.Parameter(torch.empty(0), requires_grad=False))
                replace_in_place(journal, site.module, new)
            for site in sites:
                for operator in _operators(site.module):
                    journal.note(operator)
                    operator.base_was_packed()
            note_form(journal, model)
        return model


def dequantize(model: M) -> M:
    """Convert every quantized linear layer of a host to a dense one, in place. The new weights are the unpacked ones.

    Injections stay active and compute the same. The quantization entry in the config of a transformers model is
    removed.

    Raises:
        QuantizationError: an injection is merged into quantized weights.
        MemoryLimit: the dense weights certainly do not fit into the memory of a device.
        UnsupportedSite: a weight is quantized in a way that no installed plugin can read.

    After an error nothing is changed.
    """
    with changing(model):
        check_readable(model)
        dtype = floating_dtype(module for module in model.modules() if not isinstance(module, AdapterModules))
        layers = {path: layer_of(module, "weight") for path, module in model.named_modules()}
        packed = {path: layer for path, layer in layers.items() if isinstance(layer, QuantizedLayer)}
        for module in model.modules():
            if (slot := slot_of(module)) is not None and slot.state.made_dense:
                raise QuantizationError(f"{MERGED}, because unmerging would restore quantized codes")
        for path in packed:
            _check_unmerged(model.get_submodule(path))
        modules = {path: model.get_submodule(path) for path in packed}
        check_room(
            totals(
                (layer.like(module, "weight").device, layer.shape(module, "weight").numel() * width.itemsize)
                for path, layer in packed.items()
                for module in [modules[path]]
                for width in [layer.dtype(module) or dtype]
            ),
            "making the weights dense",
            "Move the model to the CPU first",
        )
        dense = [
            dense_linear(layer.unpack(modules[path]), layer.dtype(modules[path]) or dtype)
            for path, layer in packed.items()
        ]
        with Journal() as journal:
            for module, new in zip(modules.values(), dense, strict=True):
                replace_in_place(journal, module, new.train(module.training))
            note_form(journal, model, list(packed))
        return model


def _check_unmerged(module: nn.Module) -> None:
    slot = slot_of(module)
    if slot is not None and any(name in slot.mounts for name in slot.state.merged):
        raise QuantizationError(MERGED)


def _sites(model: nn.Module, target: Target | None, exclude: Target | None) -> Iterator[Site]:
    resolver = Resolver(model, host_map(model), layer_of)
    try:
        found = resolver.sites("all-linear" if target is None else target, exclude=exclude)
    except TargetError:
        if target is not None:
            raise
        found = resolver.sites(nn.Linear, exclude=exclude)
    seen: set[int] = set()
    dense: list[str] = []
    for site in found:
        linear = isinstance(site.layer, Linear) and not site.layer.one_hot  # a table is no linear layer, in any storage
        fits = linear and site.layer.called and site.tensor == "weight"
        if not fits and target is not None:
            raise UnsupportedSite(
                f"{site.path} is not a linear layer that is called, so its weight cannot be packed: exclude it"
            )
        if not fits:
            dense.append(site.path)
        if not fits or site.layer.packed or id(site.module) in seen:
            continue
        if not has_place(site.module, "weight"):
            raise QuantizationError(
                f"{site.path} computes its weight in a custom way, so packing would leave two weights: exclude it"
            )
        _check_unmerged(site.module)
        seen.add(id(site.module))
        yield site
    if not seen:
        raise TargetError("there is no dense linear layer to pack here: pass another model or target=")
    if dense:
        notice(
            [
                f"quantize: {len(dense)} weights stay dense, because they do not belong to linear layers that are "
                f"called ({dense[0]}, ...)"
            ]
        )


def _operators(module: nn.Module) -> Iterator[Any]:
    slot = slot_of(module)
    for own in slot.mounts.values() if slot is not None else ():
        for mount in own:
            operator = mount.operator
            if mount.tensor == "weight":
                packs = type(operator).base_to_pack is not _Base.base_to_pack
                if packs and (idle := vars(operator).get(IDLE)) is not None:
                    raise idle.error("the weight that is to be packed cannot be computed")
                yield operator


@torch.no_grad()
def _to_pack(site: Site) -> Tensor:
    with resting(parametrized(site.module).values()):
        stored = site.layer.read(site.module, site.tensor)
    assert stored is not None, "a linear layer has a weight"
    weight = site.layer.logical(stored)
    for operator in _operators(site.module):
        weight = operator.base_to_pack(weight)
    return weight.detach().contiguous()
