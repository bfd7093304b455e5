"""CIAT, the counter-interference adapter.   Zhu et al. 2021, arXiv 2104.08154 (code: Yaoming95/CIAT).

Equation:
    h_0' = h_0 + A(h_0)                               the embeddings, which the first block of a stack reads
    s' = s + Branch(x) + A(x),   x = LN(s)            beside self-attention and feed-forward, not cross-attention
    A(x) = W_up relu(W_down LN_A(x) + b_down) + b_up,   W_down [d / r, d],   W_up [d, d / r]

Each A has a separate norm LN_A. x is the input of a branch; in post-norm hosts, that is the stream itself. h_0 includes
positions. Dropout acts on the output of relu.

The paper trains one set of adapters for each pair of languages, on a frozen multilingual model. To do so, apply the
method once for each pair, and activate its injection or route rows to it.

Parameters, with w = d / r: 2 d w + w + 3 d for each branch and each stack's embeddings.

Start: Both matrices by Glorot's rule, as in the authors' code, biases at zero. A fresh adapter changes the outputs.
``init="zero"`` starts W_up at zero, which is an exact identity.

Differs from the authors' code: In the paper's formulas an adapter lacks its norm if a norm of the host precedes it;
here and in the authors' code each adapter has one. Here h_0 is read after the dropout of the embeddings, in the
authors' code before it. While adapters train, the authors' code turns off the dropout of the host's branches; here it
is unchanged.

Use it: `peftcore.apply(model, "ciat")`, where tasks or languages share a model and interfere with each other from the
first layer on. The adapters are large, half as wide as the stream, and cannot be merged; `parallel_adapter` is a
similar method without norms and without the adapter of embeddings, and `madx_invertible` adapts only the embeddings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    BlockSite,
    BranchSite,
    Bypass,
    InputOperator,
    LearningRate,
    Method,
    MethodConfig,
    Mine,
    Operator,
    Share,
    Site,
    Surgeon,
    Tags,
    block_depths,
    branch,
)
from peftcore.errors import UnsupportedSite
from peftcore_additive._bottleneck import cast_linear, width_of


class CIATConfig(MethodConfig):
    """Options of CIAT."""

    method: Literal["ciat"] = "ciat"
    reduction: PositiveInt = 2
    """The width of the stream, divided by the inner width of the adapters."""
    dropout: Share = 0.3
    """Probability with which outputs of relu are dropped in training."""
    embeddings: bool = True
    """Also adapt the input of the first block of each stack that contains a target."""
    init: Literal["glorot", "zero"] = "glorot"
    """The start of W_up: random by Glorot's rule, or zero, which makes a fresh adapter an exact identity."""

    def inner(self, width: int) -> int:
        """Return the inner width of an adapter for a stream of this width."""
        return max(1, width // self.reduction)


class Bottleneck(nn.Module):
    """The adapter A: a norm and two matrices."""

    def __init__(self, inputs: int, outputs: int, config: CIATConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs, eps=1e-6)
        self.down = nn.Linear(inputs, config.inner(inputs))
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.inner(inputs), outputs)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if config.init == "zero":
            nn.init.zeros_(self.up.weight)

    def added(self, operator: Operator, x: Tensor) -> Tensor:
        """Map ``[..., d]`` to the same shape and dtype; the operator is the one that contains this bottleneck."""
        weight, bias = operator.cast(x, self.norm.weight, self.norm.bias)
        x = nn.functional.layer_norm(x, weight.shape, weight, bias, self.norm.eps)
        return cast_linear(operator, self.up, self.dropout(cast_linear(operator, self.down, x).relu()))


class BranchOperator(Bypass):
    """The adapter in parallel with a branch."""

    def __init__(self, site: BranchSite, config: CIATConfig) -> None:
        super().__init__(site)
        self.A = Bottleneck(site.width, site.out_features, config)

    def beside(self, x: Tensor) -> Tensor:
        return self.A.added(self, x)


class EmbeddingsOperator(InputOperator):
    """The adapter in front of the first block of a stack."""

    def __init__(self, site: BlockSite, config: CIATConfig) -> None:
        super().__init__(site)
        self.A = Bottleneck(site.width, site.width, config)

    def arguments(self, given: dict[str, Any], mine: Mine) -> dict[str, Any]:
        h = given[self._names[0]]  # [batch, ..., d]
        rows = mine(h)
        if rows is None:
            moved = h + self.A.added(self, h)
        elif torch.compiler.is_compiling():  # whose shapes know no number of rows that a mask has
            moved = torch.where(rows.view(-1, *[1] * (h.dim() - 1)), h + self.A.added(self, h), h)
        else:
            own = rows.nonzero().squeeze(-1)
            moved = h.index_add(0, own, self.A.added(self, h[own]))
        return {**given, self._names[0]: moved}


class CIAT(Method):
    """Parallel adapters with separate norms, and one adapter of the embeddings."""

    name = "ciat"
    Config = CIATConfig
    tags = Tags(
        category="additive", paper="2104.08154", identity_at_init=False, identity_options={"init": "zero"}, random=True
    )
    learning_rate = LearningRate(
        4.9e-4, "Yaoming95/CIAT@b07e467, neurst/models/transformer_CIAT.py", on="Transformer-big, OPUS-100"
    )
    target = ("attn.output", "mlp.output")

    def inject(self, model: nn.Module, config: CIATConfig, surgeon: Surgeon) -> None:
        depths = block_depths(surgeon)
        first: dict[str | None, int] = {}
        for site in surgeon.sites():
            entries = surgeon.resolver.host.at(site.module_path)
            if surgeon.wishes.target is None and any(each.role.startswith("cross") for each in entries):
                continue
            place = branch(surgeon, site)
            surgeon.graft(place, BranchOperator, config, place.places)
            first |= {each.block: place.width for each in entries if depths.get(each.block) == 0}
        if config.embeddings and not first:
            raise UnsupportedSite(
                "no target is in the first block of a stack, whose input embeddings=True adapts; target the first "
                "block too, or set embeddings=False to adapt branches only"
            )
        for block, width in first.items() if config.embeddings else ():
            surgeon.graft(_block(surgeon, block or "", width), EmbeddingsOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: CIATConfig) -> int:
        inputs, outputs = width_of(site), width_of(site) if isinstance(site, BlockSite) else site.out_features
        return (inputs + outputs + 1) * config.inner(inputs) + outputs + 2 * inputs


def _block(surgeon: Surgeon, path: str, width: int) -> BlockSite:
    """Return a block as a site.

    Raises:
        UnsupportedSite: the block does not read exactly one sequence of features, or it runs for several layers, of
            which not all read embeddings.
    """
    host = surgeon.resolver.host
    if host.on_grid(path) or any(each.block == path and each.stream == "context" for each in host.entries):
        raise UnsupportedSite(
            f"{path} does not read one sequence of embeddings; set embeddings=False to adapt branches only"
        )
    once = not surgeon.resolver.check_runs_once(path)
    return BlockSite(**vars(replace(surgeon.resolver.site(path, "weight", "block"), once=once)), width=width)
