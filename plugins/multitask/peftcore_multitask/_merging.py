"""Base classes of methods that merge the deltas of several adapters, their *parts*, into one change of a weight.

The parts do not act one after the other: at each site their deltas tau_t = W_t - W are combined, and W' = W + combined.
The merge is differentiable, so parts may train together. A part is any method that can be merged; its changes of biases
are combined in the same way. Effects other than changes of weights (a dropout of inputs) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import peftcore
from peftcore.author import (
    Graft,
    MethodConfig,
    OfParts,
    Site,
    Slices,
    Surgeon,
    WeightOperator,
    bias_name,
    changes_bias,
    is_mergeable,
    merge_math,
    options_of,
)
from peftcore.errors import ConfigError, UnsupportedSite

Key = tuple[str, str, Slices | None]
"""The path of a module, the name of a tensor, and the slices of that tensor."""
Members = dict[int, Graft]
"""The installed operators (grafts) at one tensor, by number of the part. Parts that do not change the tensor are
missing."""


MOST = 100
"""The largest number of parts."""


class PartsConfig(MethodConfig):
    """Options of a method that combines parts."""

    changes_weights: ClassVar[bool] = True
    """Whether every part must be a method that changes weights and can be merged."""

    parts: list[dict[str, Any]] = Field(
        default_factory=lambda: [{"method": "lora"}, {"method": "lora"}], min_length=1, max_length=MOST
    )
    """The adapters to combine. Each entry has the options of one adapter, the name of its method under "method", and
    optionally its own "target"."""
    weights: list[float] | None = None
    """A weight for each part, which may be negative; equal weights by default."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        for part in self.parts:
            options, cls = options_of(part), peftcore.method(part["method"])
            tags = cls.tags
            if cls.looks_at_data(options) or tags.scheduled or (self.changes_weights and not tags.mergeable):
                raise ConfigError(
                    f"{part['method']!r} cannot be a part of {self.method}: parts are changes of weights that need "
                    "neither a schedule nor data"
                )
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise ConfigError(f"{len(self.weights)} weights for {len(self.parts)} parts; pass one weight for each part")
        return self


def precise(tensor: Tensor) -> Tensor:
    """Cast a tensor to float32 or better, so that small changes are not lost in the weight."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class MergingOperator(WeightOperator):
    """The combined change of one tensor, and of its bias."""

    def __init__(self, site: Site, config: PartsConfig, members: Members, number: int = 0) -> None:
        super().__init__(site)
        self.number = number
        self.parts = nn.ModuleDict({str(index): graft.operator for index, graft in members.items()})
        self.layers = {str(index): graft.site.layer for index, graft in members.items()}
        weights = [1.0] * len(config.parts) if config.weights is None else config.weights
        self.weights = {str(index): weights[index] for index in members}

    def combined(self, deltas: dict[str, Tensor]) -> Tensor:
        """Return one delta, merged from the deltas of the parts (by number of the part). Parts that do not change a
        bias are missing in the deltas of that bias."""
        raise NotImplementedError

    def forward(self, weight: Tensor | None) -> Tensor:
        base = None if weight is None else precise(weight)
        change = self.combined({index: self._delta(index, base) for index in self.parts})
        return change if base is None else base + change

    def _delta(self, index: str, base: Tensor | None) -> Tensor:
        operator: Any = self.parts[index]
        if base is None:
            return precise(operator.merged(None))
        factors, theirs = operator.factors(), self.layers[index]
        if theirs == self.layer:
            return operator.merged(base) - base if factors is None else merge_math.product(factors).view(base.shape)
        seen = theirs.logical(self.layer.stored(base))  # a value in the place of the whole tensor is as it is stored
        change = operator.merged(seen) - seen if factors is None else merge_math.product(factors).view(seen.shape)
        return self.layer.logical(theirs.stored(change))

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        base = None if bias is None else precise(bias)
        operators: dict[str, Any] = dict(self.parts.items())
        new = {index: each.merged_bias(base, lambda: precise(weight())) for index, each in operators.items()}
        deltas = {k: v if base is None else v - base for k, v in new.items() if v is not None and v is not base}
        if not deltas:
            return bias
        change = self.combined(deltas)
        return change if base is None else base + change


class OfMergedParts(OfParts):
    """Base class of methods that consist of parts. It passes options on to the parts and counts their parameters."""

    @staticmethod
    def parameter_count(site: Site, config: Any) -> int:
        """Return the number of parameters of all parts at a site."""
        every = [(peftcore.method(part["method"]), options_of(part)) for part in config.parts]
        return sum(method.parameter_count(site, options.at(site.path)) for method, options in every)


def collected(surgeon: Surgeon, config: PartsConfig) -> dict[Key, Members]:
    """Return the operators of all parts, grouped by the tensor that they change, without installing them.

    Raises:
        UnsupportedSite: parts change one tensor in different ways, so their deltas cannot be separated.
    """
    groups: dict[Key, Members] = {}
    for index, part in enumerate(config.parts):
        method = peftcore.method(part["method"])()
        for graft in surgeon.collect(str(index), method, options_of(part), part.get("target")):
            if graft.operator.trains_only:  # merging leaves it out
                continue
            site = graft.site
            members = groups.setdefault((site.module_path, site.tensor, site.slices), {})
            if index in members:
                raise UnsupportedSite(
                    f"{site.path}: {method.name} acts on it twice, so it has no single delta; exclude it"
                )
            members[index] = graft
    _check_apart(groups)
    return groups


def merge_parts(surgeon: Surgeon, config: PartsConfig, operator: Callable[..., MergingOperator]) -> None:
    """Install one operator for each tensor that any part changes.

    Raises:
        UnsupportedSite: a part does more than change the weight, or parts change a tensor in different ways.
    """
    for number, members in enumerate(collected(surgeon, config).values()):
        for graft in members.values():
            if not is_mergeable(graft.operator):
                raise UnsupportedSite(
                    f"{graft.site.path}: {type(graft.operator).__name__} does not change a weight, so it cannot be "
                    "merged; exclude it"
                )
        first = next(iter(members.values()))
        surgeon.graft(first.site, operator, config, first.holders[1:], members=members, number=number)


def _check_apart(groups: Mapping[Key, Members]) -> None:
    """Raise UnsupportedSite if a tensor belongs to several groups. Biases that change together with a weight are
    checked too."""
    held: dict[str, list[tuple[Key, Slices | None]]] = {}
    for key, members in groups.items():
        places = [{_name(each.module_path, each.tensor) for each in graft.holders} for graft in members.values()]
        biases = {_name(key[0], bias_name(key[1])) for graft in members.values() if changes_bias(graft.operator)}
        for name in sorted(biases.union(*places)):
            crossed = any(other != key and _meet(rows, key[2]) for other, rows in held.get(name, ()))
            if crossed or any(place != places[0] for place in places):
                raise UnsupportedSite(
                    f"parts change {name} in different ways (whole or in rows, tied or alone, with or without the "
                    "weight, or from another module); set the same targets for all parts, or exclude it"
                )
            held.setdefault(name, []).append((key, key[2]))


def _name(module: str, tensor: str) -> str:
    return f"{module}.{tensor}".lstrip(".")


def _meet(one: Slices | None, other: Slices | None) -> bool:
    if one is None or other is None:
        return True
    return any(start < end and begin < stop for start, stop in one for begin, end in other)
