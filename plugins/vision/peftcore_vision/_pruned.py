"""Prompts of which tokens and segments are switched off, and the scores that select these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore import Injection, activate
from peftcore.author import Batches
from peftcore.errors import CalibrationError, ConfigError, UnsupportedSite
from peftcore_vision._prompts import DeepOperator, PromptConfig, PromptSite


class PrunedOperator(DeepOperator):
    """The prompt of one block, whose tokens are cut into segments: channel c is in segment c mod `segments`."""

    kept: Tensor

    def __init__(self, site: PromptSite, config: PromptConfig, segments: int, projection: Any) -> None:
        super().__init__(site, config, projection)
        if site.width % segments:
            raise UnsupportedSite(f"{site.path} is {site.width} wide, which is no multiple of segments={segments}")
        self.register_buffer("kept", torch.ones(config.length, segments))  # [length, segments]: 0 where pruned

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        kept = values.get("kept")
        if kept is not None and not ((kept == 0) | (kept == 1)).all():
            yield "kept holds others than 0 and 1"

    def rows(self, x: Tensor, others: tuple[Any, ...]) -> Tensor:
        rows = super().rows(x, others)  # [batch, length, width]
        return rows * self.kept.to(rows.dtype).repeat(1, rows.shape[-1] // self.kept.shape[1])


def _prompts(injection: Injection) -> list[PrunedOperator]:
    """Return the operators with prompts in segments.

    Raises:
        ConfigError: there are none, or they differ in size.
    """
    found = [each for each in injection.operators.values() if isinstance(each, PrunedOperator)]
    if len({each.kept.shape for each in found}) != 1:
        raise ConfigError(
            f"{injection.name!r} has no prompts of one length and number of segments that could be pruned together"
        )
    return found


def importance(injection: Injection, data: Iterable[Any], absolute: bool = False) -> Tensor:
    """Return how the loss follows what is kept of the prompts of an adapter that was trained, ``[length, segments]``:
    the derivative by the mask that all blocks share, as a mean over batches. The model is in evaluation for that.

    Args:
        injection: the adapter.
        data: batches with a loss, as for `peftcore.apply`.
        absolute: take the size of each batch's derivative.

    Raises:
        CalibrationError: data or a loss is missing, or the loss is not finite.
        ConfigError: the adapter lacks prompts in segments.
    """
    prompts, model = _prompts(injection), injection.model
    held, modes = [each.kept for each in prompts], {module: module.training for module in model.modules()}
    found: list[Tensor] = []
    try:
        mask = held[0].clone().requires_grad_()
        for each in prompts:
            each.kept = mask
        model.eval()
        with activate(model, injection.name), torch.enable_grad():
            for batch in Batches(model, data, f"{injection.method.name} looks at the data"):
                (slope,) = torch.autograd.grad(batch.loss(), [mask])
                found.append(slope.abs() if absolute else slope)
    finally:
        for each, kept in zip(prompts, held, strict=True):
            each.kept = kept
        for module, mode in modes.items():
            module.training = mode
    mean = torch.stack(found).mean(0)
    if not mean.isfinite().all():
        raise CalibrationError("the loss has no finite derivative by the prompts; give other data")
    return mean


@torch.no_grad()
def prune(injection: Injection, scores: Tensor, tokens: int = 0, segments: int = 0) -> None:
    """Switch off the `tokens` tokens with the lowest scores in all prompts of an adapter, and of each token the
    `segments` segments with the lowest.

    Args:
        injection: an adapter whose prompts have the sizes of the one that was scored: a fresh one, to train again.
        scores: those of `importance`, ``[length, segments]``.
        tokens: how many tokens, fewer than there are.
        segments: how many segments of each, fewer than there are.

    Raises:
        ConfigError: the numbers or sizes do not fit.
    """
    prompts = _prompts(injection)
    kept = torch.ones_like(prompts[0].kept)
    if scores.shape != kept.shape or not (0 <= tokens < len(kept) and 0 <= segments < kept.shape[1]):
        raise ConfigError(
            f"prompts of [length, segments] = {list(kept.shape)} cannot be pruned of {tokens} tokens and {segments} "
            f"segments by scores of {list(scores.shape)}: leave one of each"
        )
    scores = scores.to(kept)
    kept.scatter_(1, scores.argsort(dim=1, stable=True)[:, :segments], 0.0)
    kept[scores.sum(1).argsort(stable=True)[:tokens]] = 0
    for each in prompts:
        each.kept.copy_(kept)
