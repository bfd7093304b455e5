"""Modules at which several adapters act: injections of the model, or the parts that a method contains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

import peftcore
from peftcore import injections
from peftcore.author import Calls, Graft, OneForward, Replacement, Site, Surgeon, on_first, options_of
from peftcore.errors import ConfigError, UnknownInjection, UnsupportedSite

Members = list[list[nn.Module]]
"""The operators of each adapter at one place; several where an adapter is a hybrid."""


def of_host(surgeon: Surgeon, names: Sequence[str]) -> list[list[Site]]:
    """Return the modules at which injections of the model act, as far as the user's target and exclude go: each with
    others at which the same operators act too. Operators that replace tensors are skipped.

    Raises:
        UnknownInjection: the host lacks one.
        CompositionError: one does not act on outputs of modules alone.
    """
    there = injections(surgeon.model)
    if unknown := [name for name in names if name not in there]:
        raise UnknownInjection(f"no injection named {unknown[0]!r}; this host has: {', '.join(there) or 'none'}")
    places: dict[str, list[Site]] = {}
    taken: dict[str, list[Site]] = {}
    for injection in [there[name] for name in names]:
        injection.check_combinable()
        for graft in injection.grafts:
            if isinstance(graft.operator, Replacement):
                continue
            paths = [site.module_path for site in graft.holders]
            place = next((taken[path] for path in paths if path in taken), None)
            place = places.setdefault(paths[0], []) if place is None else place
            for site in graft.holders:
                if site.module_path not in taken:
                    taken[site.module_path] = place
                    place.append(_as_called(surgeon, site))
    here = {site.module_path for site in surgeon.chosen([place[0] for place in places.values()])}
    return [place for path, place in places.items() if path in here]


def only_inputs(model: nn.Module, names: Sequence[str], place: Sequence[Site]) -> bool:
    """Return whether all that injections of the model do at some modules is to give them other inputs."""
    there, paths = injections(model), {site.module_path for site in place}
    grafts = [graft for name in names for graft in there[name].grafts]
    here = [graft for graft in grafts if any(site.module_path in paths for site in graft.holders)]
    return all(graft.operator.only_inputs for graft in here)


def _as_called(surgeon: Surgeon, site: Site) -> Site:
    """Return the whole module of a site, as one that is called; where it cannot be called, the surgeon raises."""
    if site.form == "weight":
        site = surgeon.resolver.site(site.module_path, site.tensor)
    return replace(site, slices=None, meta=surgeon.dry)


def of_parts(surgeon: Surgeon, parts: Sequence[dict[str, Any]]) -> list[tuple[Site, tuple[Site, ...], Members]]:
    """Return the sites at which any of the parts acts, the other sites that its operators hold, and the operators of
    each part.

    Raises:
        ConfigError: a part does not act on outputs of modules alone, looks at data, or changes with the steps.
        UnsupportedSite: a part acts on a tensor, or parts meet in different ways.
    """
    found: dict[str, dict[int, list[Graft]]] = {}
    for index, part in enumerate(parts):
        options = options_of(part)
        method = peftcore.method(part["method"])()
        tags = method.tags
        if method.looks_at_data(options) or tags.scheduled or not tags.per_row:
            raise ConfigError(
                f"{method.name} cannot be a part: parts act on outputs of modules alone, without a schedule and "
                "without a look at data"
            )
        for graft in surgeon.collect(str(index), method, options, part.get("target")):
            path = graft.site.path
            if graft.site.form != "activation":
                raise UnsupportedSite(
                    f"{path}: {method.name} acts on a tensor or inside an attention there, so it has no output of its "
                    "own; fuse injections of it (adapters=), or exclude it"
                )
            found.setdefault(path, {}).setdefault(index, []).append(graft)
    places = []
    for path, members in found.items():
        grafts = [graft for part in members.values() for graft in part]
        ways = {tuple(site.module_path for site in graft.holders) for graft in grafts}
        if len(ways) > 1:
            raise UnsupportedSite(f"{path}: the parts that are named for it stand at different modules")
        operators: list[list[nn.Module]] = [[graft.operator for graft in part] for part in members.values()]
        places.append((grafts[0].site, grafts[0].holders[1:], operators))
    return places


def outputs_of(
    parts: Sequence[Sequence[Callable[..., Any]]],
    calls: Calls,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, list[Any]]:
    """Return the module's output by itself and its outputs with each part; no parts where all pass on."""
    base = calls(*args, **kwargs)
    outputs = []
    for part in parts:
        inner: Callable[..., Any] = calls
        for around in part:
            inner = functools.partial(around, inner)
        outputs.append(inner(*args, **kwargs))
    if all(output is base for output in outputs):
        return base, []
    return base, outputs


def first_of(output: Any) -> Tensor:
    """Return a module's output, or its first entry where it is a tuple."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def fused(
    fusion: Any,
    parts: list[list[Callable[..., Any]]],
    module: nn.Module,
    call: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return a module's output under a fusion that owns its parts: it mixes their outputs, or the inputs that they pass
    to the module."""
    calls = Calls(OneForward(call, module))
    base, outputs = outputs_of(parts, calls, *args, **kwargs)
    if not outputs:
        return base
    if fusion.mixes_inputs:
        inputs = [calls.given(output) for output in outputs]
        return calls.again(base, fusion.combine_inputs(inputs, calls.given(base), first_of(base)))
    return on_first(base, lambda h: fusion.combine([first_of(output) for output in outputs], h))


def mixes_inputs(site: Site, mixes: str, can: bool) -> bool:
    """Return whether the fusion at a site mixes inputs.

    Raises:
        UnsupportedSite: it is to, and adapters do there more than to give a module another input.
    """
    if mixes == "inputs" and not can:
        raise UnsupportedSite(
            f"{site.path}: adapters do more here than to give a module another input, as they do in front of a norm "
            'that ends a block; mixes="outputs" fuses what modules return'
        )
    return can and mixes != "outputs"
