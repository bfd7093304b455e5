"""E2VPT: visual prompts, keys and values in attention, and pruning.   Han et al. 2023, arXiv 2307.13770.

Equation:
    [x_l; ...] = L_l([x_{l-1}; M * P_l]),   head h of L_l:  softmax(q_h [K_lh; k_h]^T / sqrt(d_h)) [V_lh; v_h]

P_l [length, d] is the prompt of block l, as in `vpt_deep`, whose page describes heads, pooling and dropout. K_l = V_l
[heads, kv_length, d_h] are added to the keys and values after their projections; they have no queries, so they add no
tokens. With `share_kv` False, K_l and V_l are separate. The mask M has one number for each token and segment, the same
for all blocks; it is 1 until the prompts are pruned. The paper prunes trained prompts, and then trains the remaining
ones again from the start:

    scores = importance(trained, batches)          # dL/dM, [length, segments]
    prune(fresh, scores, tokens=2, segments=4)     # of a second adapter, with the options of the first

For details that the paper leaves open, this follows the code (ChengHan111/E2VPT): channel c is in segment c mod
`segments`; the score of a token is the sum of its segments' scores; the lowest signed scores are pruned
(``absolute=True`` takes the derivatives' magnitudes); pruned tokens stay as rows of zeros.

Parameters: (length + kv_length) * d per block, with separate keys and values (length + 2 kv_length) * d; with
`projection` as in `vpt_deep`; and the head.

Start: P as in `vpt_deep`, K and V from Kaiming-uniform draws. No start is an identity.

Differs from the authors' code: The code's masks train with the prompts before pruning; here they are 1. The code tries
each pair of pruning shares from 10 to 90 percent on validation data; here the user chooses them.

Use it: `peftcore.apply(model, "e2vpt")`, instead of `vpt_deep`, to get fewer or better prompts; not where two trainings
and a pruning step are too expensive: `vpt_deep` is simpler. Rotary positions, windows and convolutions between tokens
are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore import Injection, activate
from peftcore.author import (
    Attend,
    AttentionOperator,
    AttentionSite,
    Batches,
    LearningRate,
    Method,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
)
from peftcore.errors import CalibrationError, ConfigError, UnsupportedSite
from peftcore_vision._prompts import (
    DeepOperator,
    PromptConfig,
    PromptSite,
    attentions_of,
    prompt_count,
    prompt_sites,
    shared_projection,
    train_heads,
)

__all__ = ["E2VPT", "importance", "prune"]


class E2VPTConfig(PromptConfig):
    """Options of E2VPT."""

    method: Literal["e2vpt"] = "e2vpt"
    kv_length: PositiveInt = 5
    """Number of trained keys and values that are added to each attention."""
    share_kv: bool = True
    """Use the same numbers as keys and as values."""
    kv_dropout: Share = 0.0
    """Dropout probability of the trained keys and values, with separate draws for both."""
    segments: PositiveInt = 16
    """Number of segments of a prompt token; segments can be pruned separately."""


class PrunedOperator(DeepOperator):
    """The prompt of one block, whose tokens are cut into segments: channel c is in segment c mod `segments`."""

    kept: Tensor

    def __init__(self, site: PromptSite, config: E2VPTConfig, projection: Shared | None) -> None:
        super().__init__(site, config, projection)
        segments = config.segments
        if site.width % segments:
            raise UnsupportedSite(
                f"{site.path} has width {site.width}, which is not a multiple of segments={segments}; set another "
                "segments="
            )
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
        ConfigError: there are no prompts, or they differ in size.
    """
    found = [each for each in injection.operators.values() if isinstance(each, PrunedOperator)]
    if len({each.kept.shape for each in found}) != 1:
        raise ConfigError(
            f"{injection.name!r} has prompts of several lengths or numbers of segments, or none, so they cannot be "
            "pruned together; apply e2vpt with one length= and one segments="
        )
    return found


def importance(injection: Injection, data: Iterable[Any], absolute: bool = False) -> Tensor:
    """Return the importance scores of a trained adapter's prompts, ``[length, segments]``: the derivative of the loss
    with respect to the mask that all blocks share, averaged over batches. The model runs in eval mode.

    Args:
        injection: the adapter.
        data: batches with a loss, as for `peftcore.apply`.
        absolute: use the magnitude of each batch's derivative.

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
        raise CalibrationError("the loss has no finite gradient in the prompts; pass other data")
    return mean


@torch.no_grad()
def prune(injection: Injection, scores: Tensor, tokens: int = 0, segments: int = 0) -> None:
    """Prune all prompts of an adapter: switch off the `tokens` tokens with the lowest scores, and in each token the
    `segments` segments with the lowest scores.

    Args:
        injection: the adapter to prune, usually a fresh one; its prompts must have the sizes of the scored adapter's.
        scores: the result of `importance`, ``[length, segments]``.
        tokens: how many tokens to prune; at least one must stay.
        segments: how many segments of each token to prune; at least one must stay.

    Raises:
        ConfigError: the scores do not have the prompts' sizes, or no token or segment would stay.
    """
    prompts = _prompts(injection)
    kept = torch.ones_like(prompts[0].kept)
    if scores.shape != kept.shape or not (0 <= tokens < len(kept) and 0 <= segments < kept.shape[1]):
        raise ConfigError(
            f"cannot prune {tokens} tokens and {segments} segments of prompts [length, segments] = {list(kept.shape)} "
            f"by scores of {list(scores.shape)}: pass scores of the prompts' shape, and keep at least one of each"
        )
    scores = scores.to(kept)
    kept.scatter_(1, scores.argsort(dim=1, stable=True)[:, :segments], 0.0)
    kept[scores.sum(1).argsort(stable=True)[:tokens]] = 0
    for each in prompts:
        each.kept.copy_(kept)


class KeyValueOperator(AttentionOperator):
    """The trained keys and values of one attention."""

    def __init__(self, site: AttentionSite, config: E2VPTConfig) -> None:
        super().__init__(site)
        sizes = self.geometry
        if config.share_kv and sizes.head_dim != sizes.value_dim:
            raise UnsupportedSite(f"{site.path} has keys and values of different widths; set share_kv=False")
        self.key = nn.Parameter(torch.empty(sizes.kv_heads, config.kv_length, sizes.head_dim))
        self.value = None if config.share_kv else nn.Parameter(self.key.new_empty(*self.key.shape[:2], sizes.value_dim))
        for tensor in self.parameters():
            nn.init.kaiming_uniform_(tensor)
        self.dropout = nn.Dropout(config.kv_dropout)

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own, other = (
            self.dropout(each.to(key.dtype).expand(len(key), -1, -1, -1))  # [batch, heads, kv_length, width]
            for each in (self.key, self.key if self.value is None else self.value)
        )
        return attend(query, torch.cat([own, key], dim=2), torch.cat([other, value], dim=2))


class E2VPT(Method):
    """Visual prompts in front of each block and in each attention, which can be pruned."""

    name = "e2vpt"
    Config = E2VPTConfig
    tags = Tags(category="vision", paper="2307.13770", identity_at_init=False, per_row=False)
    learning_rate = LearningRate(
        0.25,
        "ChengHan111/E2VPT@7a66e75, tune_vtab_CVK.py",
        on="ViT-B/16, VTAB-1k, batches of 64: 1.0 of its range from 0.05 to 50, times 64 / 256",
        optimizer="SGD",
        momentum=0.9,
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: E2VPTConfig, surgeon: Surgeon) -> None:
        sites = prompt_sites(surgeon)
        for site in sites:
            projection = shared_projection(surgeon, site, config.at(site.path))
            surgeon.graft(site, PrunedOperator, config, projection=projection)
            for attention in attentions_of(surgeon, site):
                surgeon.attention(attention, KeyValueOperator, config)
        if config.train_head:
            train_heads(surgeon, sites)

    @staticmethod
    def parameter_count(site: Site, config: E2VPTConfig) -> int:
        if not isinstance(site, AttentionSite):
            return prompt_count(site, config)
        sizes = site.geometry
        width = sizes.head_dim if config.share_kv else sizes.head_dim + sizes.value_dim
        return config.kv_length * sizes.kv_heads * width
