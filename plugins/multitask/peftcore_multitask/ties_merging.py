"""TIES merging: trim, elect signs, merge what agrees.   Yadav et al. 2023, arXiv 2306.01708.

Equation:
    tau^_t = the share `density` of w_t tau_t that is largest by magnitude, else 0
    gamma  = sign(sum_t tau^_t),                      value by value
    W'     = W + s mean {tau^_t : sign tau^_t = gamma},   0 where there is none

In a mean, values of different signs would cancel each other. Here values with the sign of the minority do not count.

Gradients reach the values that are kept and have the elected sign. Where all parts are zero, gradients reach all parts,
so that fresh parts can learn.

Parameters: those of the parts.

Start: Nothing is drawn. Fresh parts change nothing.

Differs from the authors' code: The authors' code (prateeky2806/ties-merging) trims the flattened model as a whole;
here, as in peft, each weight is trimmed separately. Where the sum is exactly 0, the sign is that of most values, as in
the authors' code; in peft it is +1. peft also elects signs before it applies the weights w_t. For LoRAs, the products B
A are merged, as in the combination "ties_svd" of peft, but without its SVD. The combination "ties" of peft merges A and
B separately.

Use it: `peftcore.apply(model, "ties_merging")`, with `peftcore_multitask.gather` for three or more trained adapters, if
a plain sum of them is not good enough.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from peftcore.author import Method, Site, Surgeon, Tags, merge_math
from peftcore_multitask._merging import Members, MergingOperator, OfMergedParts, PartsConfig, merge_parts


class TIESMergingConfig(PartsConfig):
    """Options of TIES merging."""

    method: Literal["ties_merging"] = "ties_merging"
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of each part's values that is kept."""
    sign: merge_math.Sign = "total"
    """How the sign of a value is elected. "total": the sign of the sum. "frequency": the sign that more parts have."""
    scale: float = 1.0
    """The factor s of the merged change."""


class TIESOperator(MergingOperator):
    """Merges deltas by the mean of values that are large and agree in sign."""

    def __init__(self, site: Site, config: TIESMergingConfig, members: Members, number: int = 0) -> None:
        super().__init__(site, config, members, number)
        self.density, self.sign, self.scale = config.density, config.sign, config.scale

    def combined(self, deltas: dict[str, Tensor]) -> Tensor:
        weights = [self.weights[index] for index in deltas]
        return self.scale * merge_math.ties(list(deltas.values()), weights, self.density, self.sign)


class TIESMerging(OfMergedParts, Method):
    """Changes of weights, merged where their signs agree."""

    name = "ties_merging"
    Config = TIESMergingConfig
    tags = Tags(category="multitask", paper="2306.01708", mergeable=True)
    target = ()

    def inject(self, model: nn.Module, config: TIESMergingConfig, surgeon: Surgeon) -> None:
        merge_parts(surgeon, config, TIESOperator)
