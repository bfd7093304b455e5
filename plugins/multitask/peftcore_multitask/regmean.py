"""RegMean: weights merged so that each task's outputs stay nearest.   Jin et al. 2022, arXiv 2212.09849.

Equation:
    W' = W + sum_t (W_t - W) P_t,   P_t = w_t G_t (sum_u w_u G_u)^-1
    G_t = a X_t' X_t / n + (1 - a) diag(X_t' X_t / n),   a = `off_diagonal`

X_t [n, in] are the inputs that a linear layer gets in the model of part t, on data of task t, padding left out. With a
= 1, W' minimizes sum_t w_t |X_t W'' - X_t W_t''|^2 / n_t: a linear regression, whose solution needs no data but the
matrices G_t. Whoever has an adapter and its data makes them, whoever merges takes them:

    first = grams(peftcore.load(model, "first"), batches)      # numbers by path, to be handed on beside the adapter
    merged = gather(model, "regmean", {"first": 1.0, "second": 1.0})
    take_grams(merged, [first, second])

Without grams all P_t are w_t / sum w: a plain mean, which all tensors but those of linear layers of vectors keep
(biases, norms, convolutions, embeddings, experts), as in the authors' code (bloomberg/dataless-model-merging). a is 0.9
in their notebook, where RoBERTa does without, and 0.1 in most of their scripts; a = 0 is their diagonal variant.

With `unseen` = "base" the inverse is a pseudo-inverse: in directions that no task's inputs have, W' is the base, so a
few prompts are enough, and rows of a table, which no two parts train, are added up. With a = 1 and a weight for each
row of X_t that is the gradient fusion of Mix-of-Show (arXiv 2305.18292, `mix_of_show`), whose authors descend to it
from the base by L-BFGS.

A sum of low-rank parts is low-rank: `factors` gives it, and `peftcore.to_lora` with the sum of their ranks writes it
without the P_t, which take a number for each pair of inputs, part and site.

Parameters: those of the parts.

Start: All P_t are w_t / sum w: a plain mean, which changes nothing while the parts are fresh.

Differs from the authors' code: an input that is zero in all tasks keeps the plain mean; the authors' inverse does not
exist there, and they count padding.

Use it: `peftcore.apply(model, "regmean")`, where a few batches of each task are at hand when its adapter is done; not
without (`ties_merging`, `task_arithmetic`), nor where one adapter should choose by the input (`arrow`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftcore.author import AppliedMethod, Factors, Method, Site, Surgeon, Tags, merge_math
from peftcore.errors import ConfigError
from peftcore_multitask._grams import gram_sites, grams, matrices_of, shares_of
from peftcore_multitask._merging import Members, MergingOperator, OfMergedParts, PartsConfig, merge_parts

__all__ = ["RegMean", "grams", "take_grams"]


class RegMeanConfig(PartsConfig):
    """Options of RegMean."""

    method: Literal["regmean"] = "regmean"
    off_diagonal: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    """The factor a of products of two different inputs in the matrices: the share of them that is left."""
    unseen: Literal["mean", "base"] = "mean"
    """The weight in directions that no task's inputs have: the parts' mean, where only single inputs may be unseen and
    all else is an error; or the base's."""

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.weights is not None and min(self.weights) <= 0:
            raise ValueError("weights of a mean are above 0; task_arithmetic takes away")
        return self


class RegMeanOperator(MergingOperator):
    """The changes of all parts, each multiplied from the inputs' side."""

    shares: Tensor | None

    def __init__(self, site: Site, config: RegMeanConfig, members: Members, number: int = 0) -> None:
        super().__init__(site, config, members, number)
        weights = [1.0] * len(config.parts) if config.weights is None else config.weights
        self.importance = [weight / sum(weights) for weight in weights]
        self.plain = [1.0] * len(weights) if config.unseen == "base" and site.layer.one_hot else self.importance
        self.matrix = site.layer_of(site.module, site.tensor)  # where parts bring whole values, the site knows none
        inputs = self.matrix.shape(site.module, site.tensor)[-1] if gram_sites([site]) else 0
        mean = [each * torch.eye(inputs) for each in self.importance]
        self.register_buffer("shares", torch.stack(mean) if inputs else None)  # [parts, in, in]

    def _share(self, index: str, like: Tensor) -> Tensor:
        assert self.shares is not None, "inputs are vectors"
        return self.shares[int(index)].to(like)

    def combined(self, deltas: dict[str, Tensor]) -> Tensor:
        matrices = all(delta.dim() == 2 for delta in deltas.values())
        if self.shares is None or not matrices:
            return merge_math.linear(list(deltas.values()), [self.plain[int(index)] for index in deltas])
        taus = {index: self.matrix.logical(self.layer.stored(delta)) for index, delta in deltas.items()}
        changes = [tau @ self._share(index, tau) for index, tau in taus.items()]
        return self.layer.logical(self.matrix.stored(merge_math.linear(changes, [1.0] * len(changes))))

    def factors(self) -> Factors | None:
        operators: dict[str, Any] = dict(self.parts.items())
        given: dict[str, Factors | None] = {index: operator.factors() for index, operator in operators.items()}
        known = {index: factors for index, factors in given.items() if factors is not None}
        if len(known) < len(given):
            return None
        if self.shares is None:
            return merge_math.cat([*known.values()], [self.plain[int(index)] for index in known])
        turned = [(A @ self._share(index, A), B, scale) for index, (A, B, scale) in known.items()]
        return merge_math.cat(turned, [1.0] * len(turned))


class RegMean(OfMergedParts, Method):
    """Changes of weights, merged by a regression on the inputs of their tasks."""

    name = "regmean"
    Config = RegMeanConfig
    tags = Tags(category="multitask", paper="2212.09849", mergeable=True, low_rank=True)
    target = ()

    def inject(self, model: nn.Module, config: RegMeanConfig, surgeon: Surgeon) -> None:
        merge_parts(surgeon, config, RegMeanOperator)


@torch.no_grad()
def take_grams(merged: AppliedMethod, every: Sequence[Mapping[str, Tensor]]) -> None:
    """Merge by the matrices of the parts, in their order, as `grams` gave them.

    Raises:
        ConfigError: the injection is not a regmean, it is merged into the model, or matrices are missing or do not fit.
        CalibrationError: the inputs were too few to determine all directions.
    """
    found = [graft for graft in merged.grafts if isinstance(graft.operator, RegMeanOperator)]
    if not found or len(every) != len(merged.config.parts):
        raise ConfigError(
            f"take_grams is for a regmean, with the matrices of each of its parts; {merged.name!r} is a "
            f"{merged.method.name}, and they are {len(every)}"
        )
    if merged.whole.merged:
        raise ConfigError(f"{merged.name!r} is merged, so matrices would change nothing; unmerge() it first")
    made: list[tuple[Tensor, Tensor]] = []
    for graft in found:
        operator: Any = graft.operator
        if operator.shares is not None:
            path, options = graft.site.module_path, merged.config.at(graft.site.path)
            matrices = matrices_of(path, every, operator.shares)
            base = options.unseen == "base"
            made.append((operator.shares, shares_of(path, matrices, operator.importance, options.off_diagonal, base)))
    for shares, new in made:
        shares.copy_(new)
