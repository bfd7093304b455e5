"""Invertible adapters of MAD-X.   Pfeiffer et al. 2020, arXiv 2005.00052 (code: adapter-hub/adapters).

Equation:
    y1 = x1 + F(x2),   y2 = x2 + G(y1)      behind the embeddings, whose halves are x1 and x2
    x2 = y2 - G(y1),   x1 = y1 - F(x2)      in front of the head that predicts tokens: the inverse
    F(x) = W_up f(W_down x + b_down) + b_up,   W_down [h / r, h],   W_up [h, h / r],   h = d / 2

One coupling (NICE) adapts the embeddings to a language, and its inverse, with the same weights, adapts the input of the
prediction head. The coupling acts after all modules that compute the embeddings: in BERT after their norm and dropout,
and in models that add positions elsewhere, after the token table. The inverse acts in front of the last matrix of the
head. It is left out if the model lacks a head that predicts tokens. In an encoder-decoder the encoder's tokens are
adapted, and the inverse reads the decoder's output.

Parameters: 2 (d^2 / 4) 2 / r + 2 (d / 2) / r + d for the whole model.

Start: All matrices start from N(0, 0.02), biases at zero. This is nearly an identity; ``init_std=0`` makes it exact.

Differs from the authors' code: No difference is known. The paper trains the coupling together with adapters in the
layers, those of `pfeiffer_adapter`. The preset `madx` combines both.

Use it: `peftcore.apply(model, "madx_invertible")`, to teach a model a new language by predicting tokens; not to train a
task, for which you can apply `pfeiffer_adapter` in addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import ACTIVATIONS, LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags, TokenStacks
from peftcore.errors import UnsupportedSite
from peftcore_additive._bottleneck import cast_linear

AROUND, HEAD = "around", "head"
"""Values of `form` for two sites: the module around a token table that computes embeddings, and a head that predicts
tokens."""


class MadxInvertibleConfig(MethodConfig):
    """Options of the invertible adapter."""

    method: Literal["madx_invertible"] = "madx_invertible"
    reduction: PositiveInt = 2
    """Half the width of the embeddings, divided by the inner width of F and G."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    """The non-linearity f."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of all matrices at the start; 0 makes a fresh adapter an exact identity."""


class Coupling(nn.Module):
    """One of the two networks F and G, which maps one half of the features, [..., inputs], to a change of the other
    half, [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, config: MadxInvertibleConfig) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, max(1, inputs // config.reduction))
        self.activation = ACTIVATIONS[config.activation]()
        self.up = nn.Linear(self.down.out_features, outputs)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=config.init_std)
            nn.init.zeros_(linear.bias)


class InvertibleOperator(Operator):
    """The coupling on the embeddings, and its inverse in front of the head."""

    changes_inputs = True

    def __init__(self, site: Site, config: MadxInvertibleConfig, around: bool) -> None:
        super().__init__(site)
        self.around = around
        self.half_width = site.out_features // 2
        rest = site.out_features - self.half_width
        self.F, self.G = Coupling(rest, self.half_width, config), Coupling(self.half_width, rest, config)

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        if form == HEAD:
            return self._at_head
        if self.around and form != AROUND:  # the table itself
            return lambda call, *args, **kwargs: call(*args, **kwargs)
        return self

    def forward(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x1, x2 = self._halves(call(*args, **kwargs))
        y1 = x1 + self._of(self.F, x2)
        return torch.cat([y1, x2 + self._of(self.G, y1)], -1)

    def _at_head(self, call: Callable[..., Any], y: Tensor, *args: Any, **kwargs: Any) -> Any:
        y1, y2 = self._halves(y)
        x2 = y2 - self._of(self.G, y1)
        return call(torch.cat([y1 - self._of(self.F, x2), x2], -1), *args, **kwargs)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.half_width], x[..., self.half_width :]

    def _of(self, network: Coupling, x: Tensor) -> Tensor:
        return cast_linear(self, network.up, network.activation(cast_linear(self, network.down, x)))


class MadxInvertible(Method):
    """An invertible coupling on the embeddings, with its inverse in front of the head."""

    name = "madx_invertible"
    Config = MadxInvertibleConfig
    tags = Tags(category="additive", paper="2005.00052", identity_at_init=False, identity_options={"init_std": 0.0})
    learning_rate = LearningRate(
        1e-4, "adapter-hub/adapters@88f18eb, docs/training.md", on="BERT-base, masked language modelling"
    )
    target = ("embed",)

    def inject(self, model: nn.Module, config: MadxInvertibleConfig, surgeon: Surgeon) -> None:
        for table, around, heads in _embeddings(surgeon):
            surgeon.graft(table, InvertibleOperator, config, (*around, *heads), around=bool(around))

    @staticmethod
    def parameter_count(site: Site, config: MadxInvertibleConfig) -> int:
        half = site.out_features // 2
        sizes = ((site.out_features - half, half), (half, site.out_features - half))
        inner = [max(1, inputs // config.reduction) for inputs, _ in sizes]
        return sum((n + m + 1) * r + m for (n, m), r in zip(sizes, inner, strict=True))


def _embeddings(surgeon: Surgeon) -> Iterator[tuple[Site, list[Site], list[Site]]]:
    """Yield each target that is a token table, with the module around it that computes embeddings (an empty list if the
    table does this alone), and the heads that predict its tokens. Tables of a decoder that reads an encoder are left
    out.

    Raises:
        UnsupportedSite: no target is such a token table.
    """
    tables, found = {table.module_path: table for table in surgeon.sites()}, 0
    for stack in TokenStacks(surgeon).stacks:
        below = f"{stack.path}.".lstrip(".")
        table = tables.get(below + stack.table)
        if table is not None and not stack.reads:
            outer = below + stack.table.partition(".")[0]
            around = [] if outer == table.module_path else [surgeon.resolver.site(outer, "weight", "embed")]
            heads = [head for head in surgeon.at("head") if head.weight_shape == table.weight_shape[::-1]]
            around, heads = [replace(e, form=AROUND) for e in around], [replace(e, form=HEAD) for e in heads]
            yield table, around, heads
            found += 1
    if not found:
        raise UnsupportedSite(
            f"{', '.join(tables)}: an invertible adapter needs the embedding table of a stack of tokens, and these are "
            "not; use pfeiffer_adapter to adapt the layers of any model"
        )
