"""AdapterSoup: the mean of adapters' parameters.   Chronopoulou et al. 2023, arXiv 2302.07027.

Equation:
    theta = sum_t w_t theta_t,   w_t = 1/N by default;   then the method once, with theta

The user chooses the adapters of a soup. All parts have the same method, options and sites. Their tensors must be
floating-point, since indices (integers) cannot be averaged. The mean is over parameters, not over changes of weights.
For LoRAs it is the mean of B times the mean of A. This is not the mean of the products B A, which `task_arithmetic`
computes with a scale of 1/N. The paper averages bottleneck adapters; such a soup cannot be merged.

Parameters: those of the parts, N times those of one.

Start: The mean of the parts' values. A fresh adapter is the identity if fresh parts are.

Differs from the authors' code: The authors choose the adapters of a soup by similarity of domains, which is left to the
user. Weights are used as they are; the Adapters library divides them by their sum.

Use it: `peftcore.apply(model, "adapter_soup")`, with `peftcore_multitask.gather` for adapters of related domains that
were trained from the same initialization. Such adapters are in one basin of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator
from torch import Tensor, nn

from peftcore.author import (
    Factors,
    Method,
    Operator,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
    is_mergeable,
    merge_math,
    options_of,
    with_tensors,
)
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore_multitask._merging import Members, OfMergedParts, PartsConfig, collected


class AdapterSoupConfig(PartsConfig):
    """Options of an adapter soup."""

    method: Literal["adapter_soup"] = "adapter_soup"
    changes_weights: ClassVar[bool] = False

    @model_validator(mode="after")
    def _alike(self) -> Self:
        kinds = [(options_of(part), part.get("target")) for part in self.parts]
        if any(kind != kinds[0] for kind in kinds):
            raise ConfigError(
                "the parts of a soup differ in method, options or target, so they have no mean; pass parts with the "
                "same ones"
            )
        return self


class _Soup(nn.Module):
    """The operators of the parts, which have equal shapes, and the weights of their mean."""

    def __init__(self, members: Members, config: AdapterSoupConfig) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({str(index): graft.operator for index, graft in members.items()})
        self.weights = [1 / len(self.parts)] * len(self.parts) if config.weights is None else config.weights

    def mean(self) -> Any:
        """Return an operator with the mean parameters. Each call creates a new one, so threads do not share it."""
        every = [dict(part.named_parameters()) | dict(part.named_buffers()) for part in self.parts.values()]
        mixed = {name: merge_math.linear([each[name] for each in every], self.weights) for name in every[0]}
        return with_tensors(self.parts["0"], mixed)


class SoupOperator(WeightOperator):
    """The mean adapter of methods that change a weight."""

    def __init__(self, site: Site, config: AdapterSoupConfig, members: Members) -> None:
        super().__init__(site)
        self.soup = _Soup(members, config)

    def forward(self, weight: Tensor) -> Tensor:
        merged: Tensor = self.soup.mean().merged(weight)
        return merged

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        changed: Tensor | None = self.soup.mean().merged_bias(bias, weight)
        return changed

    def factors(self) -> Factors | None:
        given: Factors | None = self.soup.mean().factors()
        return given


class SoupAround(Operator):
    """The mean adapter of methods that act on a module's inputs or outputs."""

    def __init__(self, site: Site, config: AdapterSoupConfig, members: Members) -> None:
        super().__init__(site)
        self.soup = _Soup(members, config)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.soup.mean()(call, *args, **kwargs)


class AdapterSoup(OfMergedParts, Method):
    """One adapter with the mean of several adapters' parameters."""

    name = "adapter_soup"
    Config = AdapterSoupConfig
    tags = Tags(
        category="multitask",
        paper="2302.07027",
        mergeable=True,
        low_rank=True,
    )
    target = ()

    def inject(self, model: nn.Module, config: AdapterSoupConfig, surgeon: Surgeon) -> None:
        for members in collected(surgeon, config).values():
            first = next(iter(members.values()))
            site, whole = first.site, is_mergeable(first.operator)
            tensors = [*first.operator.parameters(), *first.operator.buffers()]
            if len(members) < len(config.parts) or surgeon.owned or not all(t.is_floating_point() for t in tensors):
                raise UnsupportedSite(
                    f"{site.path}: {config.parts[0]['method']} shares values between sites or holds integers such as "
                    "indices, which have no mean"
                )
            if not whole and (site.form != "activation" or first.holders[1:]):
                raise UnsupportedSite(
                    f"{site.path}: a soup averages parts that change weights or wrap modules, not parts inside an "
                    "attention; exclude it"
                )
            operator = SoupOperator if whole else SoupAround
            surgeon.graft(site, operator, config, first.holders[1:], members=members)
