"""Builds an envelope from the file of another library, also if options differ between places, or if the file has
several methods."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from peftcore.files.envelope import FORMAT, Envelope, SavedSite
from peftcore.registry.catalogue import method as find_method


def literally(path: str) -> str:
    """Returns a glob that matches exactly this path."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in path)


def with_overrides(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns options for a whole method: the most frequent value of each option, and overrides for places with other
    values. `options` has the options of each place, keyed by path."""
    values: dict[str, Counter[str]] = {}
    for each in options.values():
        for name, value in each.items():
            values.setdefault(name, Counter())[json.dumps(value)] += 1
    most = {name: json.loads(counted.most_common(1)[0][0]) for name, counted in values.items()}
    overrides = {}
    for path, each in options.items():
        if other := {name: value for name, value in each.items() if value != most[name]}:
            overrides[literally(path)] = other
    return {**most, "overrides": overrides} if overrides else most


def composed(
    configs: Sequence[dict[str, Any]],
    selections: Sequence[Mapping[str, Sequence[SavedSite]]],
    *,
    dtypes: Iterable[torch.dtype],
    target: Sequence[str] | None,
    train: Sequence[str] = (),
    untied: Sequence[str] = (),
    rows: Mapping[str, tuple[int, int]] = {},
    host: str = "",
) -> Envelope:
    """Returns the envelope of one method, or of a union of several.

    Args:
        configs: the options of each method, with its name under "method".
        selections: the selections of sites of each method.
        dtypes: the dtypes of the tensors.
        target: paths of modules, for information only.
        train: the host's parameters that are replaced.
        untied: the modules that each have separate values for these parameters, even if other modules hold the same
            tensors.
        rows: by path of a token table, the range ``(start, stop)`` of its rows that are saved too.
        host: the file's name for its base, for information only.
    """
    several = len(configs) > 1
    name = "config_union" if several else configs[0]["method"]
    places = {
        f"{index}/{key}" if several else key: tuple(sites)
        for index, each in enumerate(selections)
        for key, sites in each.items()
    }
    return Envelope(
        format=FORMAT,
        method=name,
        config_version=find_method(name).config_version,
        config={"method": name, "parts": list(configs)} if several else configs[0],
        target=target,
        train=tuple(train),
        untied=tuple(untied),
        rows=dict(rows),
        dtype="float64" if torch.float64 in dtypes else "float32",
        host=host,
        selections=places,
    )
