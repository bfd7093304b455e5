"""LoReFT, representation finetuning.   Wu et al. 2024, arXiv 2404.03592 (code: stanfordnlp/pyreft).

Equation:
    loreft   h' = h + R^T (W h + b - R h),   R [r, d] with orthonormal rows
    noreft   h' = h + R^T (W h + b - R h),   R [r, d] free
    direft   h' = h + R^T (W h + b),         R free

h is a block's output at the first f and the last l positions of the prompt, in each chosen layer; each end has separate
R, W, b unless `tied`. The rows of R are kept orthonormal by a Cholesky factorization. As in the authors' code, an
`activation` acts on W h + b, dropout acts on h' as a whole, and each end covers at most half of a short prompt (a
prompt of one token is not changed). Generated tokens are not changed. The prompt is all tokens before the first label,
or the whole input without labels; ``peftcore.call(model, prompt_length=...)`` sets its length instead. In
encoder-decoder models the prompt is the encoder's input; in image models it is the block's tokens.

Parameters: 2 d r + r for each end of each layer. If `tied`, both ends count as one.

Start: R starts with random orthonormal rows; W, b and a free R start as torch's linear layers do. A fresh intervention
changes outputs. With ``identity=True`` the start is h' = h.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "loreft")`, where trained parameters must be few. It has ten to fifty times fewer than
LoRA. It cannot be merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    ACTIVATIONS,
    BlockSite,
    Checked,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    PromptPositions,
    Share,
    Surgeon,
    Tags,
    TokenStacks,
    block_sites,
    full_precision,
    on_first,
)
from peftcore.errors import TargetError, UnsupportedSite


class LoReFTConfig(MethodConfig):
    """Options of LoReFT and its ablations."""

    method: Literal["loreft"] = "loreft"
    kind: Literal["loreft", "noreft", "direft"] = "loreft"
    """The equation: that of LoReFT, of NoReFT (the rows of R need not be orthonormal), or of DiReFT (like NoReFT, but R
    h is left out)."""
    rank: PositiveInt = 4
    """Rank r of the intervention, the number of dimensions of the subspace that it changes."""
    prefix_positions: NonNegativeInt = 3
    """Number f of positions at the start of the prompt that are changed."""
    suffix_positions: NonNegativeInt = 0
    """Number l of positions at the end of the prompt that are changed."""
    short_prompts: Literal["half", "first", "last"] = "half"
    """The rule for prompts that are too short for both ends. "half": each end gets at most half of the prompt. "first":
    the first positions have priority, and the last ones get the rest. "last": the reverse, as in the adapters
    package."""
    layers: list[NonNegativeInt] | None = None
    """Numbers of the layers to change; None changes all."""
    tied: bool = False
    """Use the same intervention at the start and at the end of the prompt."""
    dropout: Share = 0.0
    """Dropout probability of the changed states h' in training."""
    activation: Literal["gelu", "relu", "silu", "tanh"] | None = None
    """A non-linearity on W h + b. The paper does not use one."""
    identity: bool = False
    """Start at h' = h: W = R and b = 0 (W = 0 and b = 0 in direft)."""

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if not self.prefix_positions + self.suffix_positions:
            raise ValueError("prefix_positions and suffix_positions are both 0; set at least one to a positive number")
        if self.identity and self.activation and self.kind != "direft":
            raise ValueError(
                "identity=True starts at W = R, which is an identity only without an activation; set activation=None "
                "or identity=False"
            )
        return self


class Intervention(Checked):
    """LoReFT's intervention, which maps ``h`` to ``h'``."""

    def __init__(self, width: int, config: LoReFTConfig) -> None:
        super().__init__()
        self.orthonormal, self.subtracts = config.kind == "loreft", config.kind != "direft"
        self.R = nn.Parameter(torch.empty(config.rank, width))
        self.learned = nn.Linear(width, config.rank)
        nn.init.orthogonal_(self.R) if self.orthonormal else nn.init.kaiming_uniform_(self.R, a=5**0.5)
        if config.identity:
            with torch.no_grad():
                self.learned.weight.copy_(self.R if self.subtracts else torch.zeros_like(self.R))
                self.learned.bias.zero_()
        self.activation = ACTIVATIONS[config.activation]() if config.activation else None
        self.dropout = nn.Dropout(config.dropout)

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        R = values.get("R")
        if self.orthonormal and R is not None:
            R = R.to(torch.promote_types(R.dtype, torch.float32))
            if torch.linalg.cholesky_ex(R @ R.mT).info:
                yield "R has linearly dependent rows"

    def rotation(self) -> Tensor:
        """Return R; its rows are orthonormal in LoReFT. It is computed in float32 or more, since torch cannot factorize
        matrices in half precision."""
        if not self.orthonormal:
            return self.R
        with full_precision(self.R):
            R = self.R.to(torch.promote_types(self.R.dtype, torch.float32))
            factor: Tensor = torch.linalg.cholesky(R @ R.mT)  # [r, r], the identity where the rows are orthonormal
            return torch.linalg.solve_triangular(factor, R, upper=False)

    def forward(self, h: Tensor) -> Tensor:
        """Return h' for states ``[..., d]``."""
        R, weight, bias = (each.to(h.dtype) for each in (self.rotation(), self.learned.weight, self.learned.bias))
        if self.activation is None:
            moved = nn.functional.linear(h, weight - R if self.subtracts else weight, bias)  # [..., r]
        else:
            moved = self.activation(nn.functional.linear(h, weight, bias)) - (h @ R.T if self.subtracts else 0)
        return self.dropout(h + moved @ R)


class ReftOperator(Operator):
    """Changes a block's output at both ends of the prompt, by low-rank interventions."""

    def __init__(self, site: BlockSite, config: LoReFTConfig, generates: bool) -> None:
        super().__init__(site)
        if config.rank > site.width:
            raise UnsupportedSite(f"{site.path} has width {site.width}, less than rank={config.rank}; lower the rank")
        self.names = site.arguments
        first, last, short = config.prefix_positions, config.suffix_positions, config.short_prompts
        self.prompt = PromptPositions(site.depth, generates, first, last, short == "half", last_wins=short == "last")
        ends = {"prefix": config.prefix_positions, "suffix": config.suffix_positions}
        names = ["both"] if config.tied else [name for name, count in ends.items() if count]
        self.ends = nn.ModuleDict({name: Intervention(site.width, config) for name in names})

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        found = self.prompt.positions(args[0], given, self.training)  # before the block fills its cache
        output = call(*args, **kwargs)
        return output if found is None else on_first(output, lambda h: self._intervene(h, *found))

    def _intervene(self, h: Tensor, front: Tensor, back: Tensor) -> Tensor:
        chosen = {"both": front | back, "prefix": front, "suffix": back}
        for name, intervention in self.ends.items():
            where = chosen[name].view(-1, *h.shape[1:-1], 1)  # [batch or 1, *tokens, 1]
            h = torch.where(where, intervention(h), h)
        return h


class LoReFT(Method):
    """Low-rank interventions on hidden states at both ends of the prompt."""

    name = "loreft"
    Config = LoReFTConfig
    tags = Tags("additive", "2404.03592", identity_at_init=False, identity_options={"identity": True})
    learning_rate = LearningRate(
        9e-4, "stanfordnlp/pyreft@dafd099, examples/loreft/README.md", on="LLaMA-7B, commonsense"
    )
    target = ("block",)
    config_version = 2
    former_defaults = ({"short_prompts": "first"},)

    def inject(self, model: nn.Module, config: LoReFTConfig, surgeon: Surgeon) -> None:
        stacks = TokenStacks(surgeon)
        for site in _chosen(surgeon, stacks, config):
            generates = stacks.generates(site)
            surgeon.graft(site, ReftOperator, config, generates=generates)

    @staticmethod
    def parameter_count(site: BlockSite, config: LoReFTConfig) -> int:
        ends = 1 if config.tied else bool(config.prefix_positions) + bool(config.suffix_positions)
        return ends * (2 * site.width * config.rank + config.rank)


def _chosen(surgeon: Surgeon, stacks: TokenStacks, config: LoReFTConfig) -> list[BlockSite]:
    """Return the blocks of the chosen layers that process the prompt."""
    sites = stacks.prompted(block_sites(surgeon, each_run=True), surgeon.wishes.target is not None)
    there = {site.depth for site in sites}
    if not there.issuperset(config.layers or ()):
        raise TargetError(f"layers={config.layers}: the layers of this model are {min(there)} to {max(there)}")
    return [site for site in sites if config.layers is None or site.depth in config.layers]
