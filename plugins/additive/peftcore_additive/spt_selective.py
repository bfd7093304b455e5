"""SPT, selective prompt tuning: it learns which blocks get separate prompts.   Zhu and Tan 2023, arXiv 2310.20127.

Equation:
    [R_l ; x_l] -> block l,   R_l = (1 - a_l) P_l + a_l p_l,   a_l = sigmoid(alpha_l),   p_l [length, d]

x_l are the tokens before block l, and P_l the rows in front of them, which the previous block returned. Block 0 does
not receive rows, so R_0 = a_0 p_0. There are two trainings. The first is a search: all blocks have prompts, and
alpha_l, one number for each block, trains too. Then ``chosen(injection, 4)`` returns the four blocks with the largest
a_l. The second trains a new adapter with `layers` set to the chosen blocks. They get full prompts, R_l = p_l. Blocks
between them keep the rows, R_l = P_l, and blocks before the first chosen one get no rows.

Rows are without positions, as in `lpt`; in encoder-decoder models they are inserted in the encoder.

Parameters: blocks * (length d + 1) in the search, then layers * length d.

Start: p_l starts from N(0, 0.02), alpha_l at zero. No start is an identity.

Differs from the authors' code: The authors' code was not found, and the paper's text was not available. The equation
follows a catalogue of methods. The authors search in two levels, with a smoothed choice: alpha trains on held-out data,
and p on the rest. Here both train on the same batches. To search in two levels, train the parameters called `alpha`
with a separate optimizer.

Use it: `peftcore.apply(model, "spt_selective", layers=[0, 1])`, where `prompt_tuning` is too weak, a prompt in each
block (`prefix_tuning`) has too many parameters, and there is time for two trainings. `lpt` has one late prompt, without
a search.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore import Injection
from peftcore.author import InnerRows, InnerSite, Method, MethodConfig, SequenceSite, Site, Surgeon, Tags
from peftcore.errors import ConfigError, UnsupportedSite


class SPTSelectiveConfig(MethodConfig):
    """Options of selective prompt tuning."""

    method: Literal["spt_selective"] = "spt_selective"
    length: PositiveInt = 10
    """Number of rows of a prompt."""
    layers: Annotated[list[NonNegativeInt], Field(min_length=1, max_length=1000)] | None = None
    """The numbers of the blocks with a prompt; None searches among all blocks."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        if self.layers is not None and len({*self.layers}) < len(self.layers):
            raise ValueError(f"layers={self.layers} names a block twice; name each block once")
        return self


class SelectiveOperator(InnerRows):
    """The prompts of one encoder or decoder."""

    def __init__(self, site: SequenceSite, config: SPTSelectiveConfig) -> None:
        super().__init__(site, config.length)
        self.prompts = nn.Parameter(torch.randn(len(self.depths), config.length, self.width) * 0.02)
        self.alpha = nn.Parameter(torch.zeros(len(self.depths))) if config.layers is None else None

    def rows_at(self, depth: int, states: Tensor, rows: Tensor, given: Mapping[str, Any]) -> Tensor:
        number = self.depths.index(depth)
        new = self.prompts[number]
        if self.alpha is None:
            return new
        share = self.alpha[number].sigmoid()
        return share * new if depth == 0 else (1 - share) * rows.to(new.dtype) + share * new


def chosen(injection: Injection, count: int) -> list[int]:
    """Return the numbers of the `count` blocks whose prompts have the largest shares a_l, in ascending order.

    Raises:
        ConfigError: the injection is not a search, since it was applied with `layers`; or it has several stacks, or
            fewer than `count` blocks.
    """
    operators = [op for op in injection.operators.values() if isinstance(op, SelectiveOperator)]
    searches = [op.alpha for op in operators if op.alpha is not None]
    if len(searches) != 1:
        raise ConfigError(
            f"{injection.name!r} has {len(searches)} searches over blocks, not one; apply spt_selective to one stack, "
            "with layers=None"
        )
    alpha = searches[0]
    if not 0 < count <= len(alpha):
        raise ConfigError(f"count={count} is not a number from 1 to {len(alpha)}, the number of blocks")
    return sorted(alpha.detach().topk(count).indices.tolist())


class SPTSelective(Method):
    """Prompts in front of the tokens in some blocks, and a search for these blocks.

    Example:
        injection = peftcore.apply(model, "spt_selective", layers=[0, 1])  # the result of chosen(search, 2)
    """

    name = "spt_selective"
    Config = SPTSelectiveConfig
    tags = Tags(category="additive", paper="2310.20127", identity_at_init=False, per_row=False)
    target = "stack"

    def inject(self, model: nn.Module, config: SPTSelectiveConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            stack = surgeon.sequence_site(site)
            if stack.stack.reads:
                raise UnsupportedSite(f"{stack.path} reads an encoder's output of the rows; target the encoder")
            layers = config.at(stack.path).layers
            blocks = list(range(surgeon.blocks_of(site))) if layers is None else sorted(layers)
            surgeon.sequence(site, SelectiveOperator, config, blocks=blocks)

    @staticmethod
    def parameter_count(site: Site, config: SPTSelectiveConfig) -> int:
        if not isinstance(site, InnerSite):
            return 0  # attentions that hide the rows
        return len(site.depths) * (config.length * site.out_features + (config.layers is None))
