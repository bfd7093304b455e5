"""Arrow: each token goes through the LoRAs that it resembles.   Ostapenko et al. 2024, arXiv 2405.11157 (in peft).

Equation:
    y = W x + b + sum_e c_e w_e s_e B_e A_e x,   c = softmax over the `top_k` largest of |v_e' x| / temperature, else 0

v_e [in] is the prototype of part e: the first right singular vector of B_e A_e, the direction of inputs that it changes
most, of length one. So no router is trained, and the data of the parts is not needed. Each token chooses separately at
each target module. The sign of v_e is arbitrary, hence |v_e' x|. The factors w_e are `weights`, 1 by default.

`general` selects GenKnowSub (ACL 2025, short paper 54). The last `general` parts are adapters of general knowledge,
which no token chooses. The mean of their factors is subtracted from the factors of all other parts: A_e - mean(A), B_e
- mean(B). This is the same as in peft; it is not the difference of the products.

No gradient passes through v_e. Parts act as in evaluation: their dropout, for example, is off.

Parameters: those of the parts; nothing more.

Start: Nothing is drawn: prototypes are computed from the parts, and fresh parts change nothing.

Differs from the authors' code: peft computes v_e once, by 15 steps of power iteration from a random start, and all
ranks must be equal. Here v_e is computed at each forward, by repeatedly squaring a matrix [rank, rank]. So it remains
correct while parts train, and ranks may differ.

Use it: `peftcore.apply(model, "arrow")`, with `peftcore_multitask.gather` for a library of LoRAs, if no label says
which LoRA an input needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Self

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import Method, Router, Site, Surgeon, Tags
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore_multitask._chosen import Factors, add_shares, first_of
from peftcore_multitask._merging import Members, OfMergedParts, PartsConfig, collected

SQUARINGS = 12
"""Number of matrix squarings that approximate the largest eigenvector, equal to 4096 steps of power iteration."""


class ArrowConfig(PartsConfig):
    """Options of Arrow."""

    method: Literal["arrow"] = "arrow"
    changes_weights: ClassVar[bool] = True
    top_k: PositiveInt = 3
    """The largest number of parts that act on a token."""
    temperature: PositiveFloat = 1.0
    """Divisor of the similarities before the softmax. If it is small, only the most similar part acts."""
    general: NonNegativeInt = 0
    """Number of parts at the end of the list that contain general knowledge, which is subtracted from the other
    parts."""

    @model_validator(mode="after")
    def _some_left(self) -> Self:
        if self.general >= len(self.parts):
            raise ConfigError(f"general={self.general} leaves none of {len(self.parts)} parts to choose from; lower it")
        return self


@torch.no_grad()
def prototype(A: Tensor, B: Tensor) -> Tensor:
    """Return the first right singular vector [in] of B A, for A [rank, in] and B [out, rank]; zeros where B A is zero.

    If u is an eigenvector of G = B'B A A' [rank, rank], then A'u is an eigenvector of A'B'B A.
    """
    A, B = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (A, B))
    power = (B.mT @ B) @ (A @ A.mT)
    tiny = torch.finfo(power.dtype).tiny
    for _ in range(SQUARINGS):
        power = power / power.norm().clamp(min=tiny)
        power = power @ power
    found = A.mT @ power  # all columns have the direction that is wanted, the longest with the least error
    longest = found.gather(1, found.norm(dim=0).argmax().view(1, 1).expand(len(found), 1)).squeeze(1)
    return longest / longest.norm().clamp(min=tiny)


class ArrowOperator(Router):
    """The parts of one module, and the choice among them for each token."""

    def __init__(self, site: Site, config: ArrowConfig, members: Members) -> None:
        super().__init__(site)
        self.parts = nn.ModuleDict({str(index): graft.operator for index, graft in members.items()})
        count = len(config.parts) - config.general
        self.tasks = tuple(index for index in members if index < count)
        self.general = tuple(index for index in members if index >= count)
        self.weights = {index: 1.0 if config.weights is None else config.weights[index] for index in members}
        self.top_k, self.temperature = min(config.top_k, len(self.tasks)), config.temperature

    def factors_of(self) -> list[Factors]:
        """Return A, B and the scale of each part, with the general parts subtracted."""
        every = {index: self.parts[str(index)].factors() for index in (*self.tasks, *self.general)}  # type: ignore[operator]
        found = [every[index] for index in self.tasks]
        if self.general:
            A, B = (torch.stack([every[index][side] for index in self.general]).mean(0) for side in (0, 1))
            found = [(each[0] - A, each[1] - B, each[2]) for each in found]
        return [(A, B, scale * self.weights[index]) for index, (A, B, scale) in zip(self.tasks, found, strict=True)]

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., in]
        y, every = call(x), self.factors_of()
        prototypes = torch.stack([prototype(A, B) for A, B, _ in every])  # [parts, in]
        likeness = (x.to(prototypes.dtype) @ prototypes.mT).abs()  # [..., parts]
        largest = likeness.topk(self.top_k, -1)
        shares = torch.zeros_like(likeness).scatter(
            -1, largest.indices, (largest.values / self.temperature).softmax(-1)
        )
        self.noted(shares)
        return add_shares(self, y, x, every, shares)


class Arrow(OfMergedParts, Method):
    """Routing among LoRAs by the inputs that they change most."""

    name = "arrow"
    Config = ArrowConfig
    tags = Tags(category="multitask", paper="2405.11157", exact_gradient=False, routes="token")
    target = ()

    def inject(self, model: nn.Module, config: ArrowConfig, surgeon: Surgeon) -> None:
        for members in collected(surgeon, config).values():
            site = first_of(members, "Arrow").site
            general = [index for index in members if index >= len(config.parts) - config.general]
            if len(general) == len(members) or len(general) < config.general:
                raise UnsupportedSite(
                    f"{site.path}: the {config.general} general parts must act at every site of the other parts, and "
                    "only there; set the same target for all parts"
                )
            shapes = {
                tuple(tensor.shape) for graft in members.values() for tensor in (graft.operator.factors() or ())[:2]
            }
            if general and len(shapes) > 2:
                raise UnsupportedSite(
                    f"{site.path}: parts have different ranks, so the general ones cannot be subtracted; use parts of "
                    "one rank"
                )
            surgeon.graft(site, ArrowOperator, config, members=members)
