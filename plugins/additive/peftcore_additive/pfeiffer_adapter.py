"""Pfeiffer adapter: one bottleneck in each layer, on the residual stream.   Pfeiffer et al. 2020, arXiv 2005.00247,
2005.00052.

Equation:
    u = LN(x + o),   y = LN(x + o + W_up f(W_down u + b_down) + b_up)   post-norm hosts: LN is the block's last norm
    u = x + o,       y = x + o + W_up f(W_down u + b_down) + b_up       pre-norm hosts

x is the stream, o the feed-forward's output that is added to it. The adapter reads the stream after the feed-forward,
and its output is added to the stream; in post-norm models the frozen norm runs twice, with the same weights.
`houlsby_adapter` differs in three points: it reads the output of a branch instead of the stream, adapts the attention
too, and trains norms.

A model counts as post-norm if no norm follows its blocks; torch's own layers have an attribute for it. An operator's
attribute `placement` contains the result. If it is wrong, set the option `placement`; wav2vec2, for example, has the
same modules with `do_stable_layer_norm` and without. Many later papers call a bottleneck on o itself a Pfeiffer
adapter: for that use placement="branch", which works at any target. Adapter+ (Steitz and Roth 2024, arXiv 2406.06820;
`adapter_plus`) is placement="pre" with a learned scale for each channel, which starts at 1, with stochastic depth, and
with a narrower start. Parameters: 2 d r + r + d a layer; a learned `scale` adds 1 or d.

Start: Both matrices start from N(0, 0.02), biases at zero. This is nearly an identity; ``up_init_std=0`` makes it
exact.

Differs from the authors' code: No difference from the adapters package is known (its `seq_bn`).

Use it: `peftcore.apply(model, "pfeiffer_adapter")`, instead of a Houlsby adapter, at half its size, or to stack
adapters for languages and tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore import HostMap
from peftcore.author import (
    MIXERS,
    AtBranchEnd,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    is_post_norm,
)
from peftcore.errors import UnsupportedSite
from peftcore_additive._bottleneck import Scale, ScaledOperator, Start, learned_scale

STREAM = "stream"  # the form of the site where an adapter acts, unless it is the one that it is named for
Placement = Literal["post", "pre", "branch"]


class PfeifferAdapterConfig(MethodConfig):
    """Options of the Pfeiffer adapter."""

    method: Literal["pfeiffer_adapter"] = "pfeiffer_adapter"
    bottleneck: PositiveInt = 48
    """Width r of the bottleneck; in the paper it is a sixteenth of the stream's width."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    """The non-linearity f."""
    placement: Literal["auto", "post", "pre", "branch"] = "auto"
    """The adapter's input: the stream after the block's last norm ("post"), the stream that the block returns ("pre"),
    or the target's output ("branch"). "auto" chooses "post" or "pre" by the model."""
    scale: Scale = 1.0
    """The factor on the adapter's output: a number, a "learned" scalar, or a learned factor for each "channel"; learned
    factors start at 1."""
    stochastic_depth: Share = 0.0
    """Probability with which a row of the batch skips the adapter in training; the adapter's output for the remaining
    rows is scaled up."""
    init: Start = "normal"
    """The distribution from which both matrices start: a normal distribution, truncated at two standard deviations
    ("cut") or not ("normal")."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of W_down at the start."""
    up_init_std: NonNegativeFloat = 0.02
    """Standard deviation of W_up at the start; 0 makes a fresh adapter an exact identity."""


class AtLayerEnd(AtBranchEnd):
    """Adds an adapter's output to the residual stream of one layer, at the block's last norm or at its output, or else
    to the target's output."""

    placement: Placement = "branch"

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        if self.placement == "branch":
            return self
        if form != STREAM:  # the feed-forward itself
            return lambda call, *args, **kwargs: call(*args, **kwargs)
        return self._around_norm if self.placement == "post" else self

    def _around_norm(self, call: Callable[..., Tensor], stream: Tensor) -> Tensor:
        return call(stream + self.added(call(stream)).to(stream.dtype))

    def adapt(self, h: Tensor) -> Tensor:
        return h + self.added(h)

    def added(self, h: Tensor) -> Tensor:
        """Return the value to add, in the layout of the input."""
        raise NotImplementedError


class PfeifferOperator(ScaledOperator, AtLayerEnd):
    """The bottleneck of one layer."""

    def __init__(self, site: Site, config: PfeifferAdapterConfig, placement: Placement) -> None:
        super().__init__(site, config)
        self.placement = placement
        self.only_inputs = placement == "post"


class PfeifferAdapter(Method):
    """One bottleneck adapter in each layer, on the residual stream."""

    name = "pfeiffer_adapter"
    Config = PfeifferAdapterConfig
    tags = Tags(category="additive", paper="2005.00247", identity_at_init=False, identity_options={"up_init_std": 0.0})
    learning_rate = LearningRate(1e-4, "arXiv 2005.00247, section 4.1", on="BERT-base, 16 tasks")
    target = ("mlp.output",)

    def inject(self, model: nn.Module, config: PfeifferAdapterConfig, surgeon: Surgeon) -> None:
        for site, placement, holders in placed(surgeon, surgeon.sites(), lambda site: config.at(site.path).placement):
            surgeon.graft(site, PfeifferOperator, config, holders, placement=placement)

    @staticmethod
    def parameter_count(site: Site, config: PfeifferAdapterConfig) -> int:
        d, r = site.out_features, config.bottleneck
        return 2 * d * r + r + d + learned_scale(config.scale, d)


def placed(
    surgeon: Surgeon, sites: Iterable[Site], wish: Callable[[Site], str]
) -> Iterator[tuple[Site, Placement, tuple[Site, ...]]]:
    """Yield the sites that get an adapter, one for each block, with its placement and the further sites that its
    operator needs.

    Raises:
        UnsupportedSite: the placement is not "branch", but a site is not the feed-forward of a block with one stream of
            tokens. Or the placement is "post", but the block does not end with a norm.
    """
    blocks: set[str] = set()
    for site in sites:
        placement = wish(site)
        if placement == "branch":
            yield site, "branch", ()
            continue
        block = _block_of(site, surgeon.resolver.host)
        if block in blocks:
            continue  # macaron blocks have two feed-forwards: one adapter a layer
        blocks.add(block)
        placement, place = _place(surgeon, block, placement)
        yield site, placement, (replace(place, form=STREAM),)


def _block_of(site: Site, host: HostMap) -> str:
    """Return the path of the block whose feed-forward a site ends."""
    block = next((each.block for each in host.at(site.module_path) if each.role in ("mlp.down", "mlp")), None)
    if block is None:
        raise UnsupportedSite(
            f'{site.path} is not the feed-forward of a layer; set placement="branch" to adapt its output'
        )
    inside = [entry for entry in host.entries if entry.block == block]
    mixes = any(each.role.partition(".")[0] in MIXERS for each in inside)
    last = site.layer.channel_dim == -1 and not host.on_grid(block)
    if not last or not mixes or any(each.stream == "context" for each in inside):
        raise UnsupportedSite(
            f"{block}: pfeiffer_adapter needs a block with one stream of tokens and features in the last dimension; "
            'set placement="branch"'
        )
    return block


def _place(surgeon: Surgeon, block: str, wish: str) -> tuple[Placement, Site]:
    """Return the placement of a block's adapter and its site: the block's last norm outside of its attentions, or the
    block."""
    inside = [entry for entry in surgeon.resolver.host.entries if entry.block == block]
    attentions = [f"{entry.path}." for entry in inside if entry.role in ("attn", "cross") and entry.path != block]
    norms = [e.path for e in inside if e.role == "norm" and not any(e.path.startswith(each) for each in attentions)]
    if norms and (wish == "post" or (wish == "auto" and is_post_norm(surgeon.resolver, block))):
        return "post", surgeon.resolver.site(norms[-1], "weight", "norm")
    if wish == "post":
        raise UnsupportedSite(f'{block} does not end with a norm; set placement="pre" or "branch"')
    return "pre", surgeon.resolver.site(block, "weight", "block")
