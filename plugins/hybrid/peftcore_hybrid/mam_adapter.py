"""MAM adapter: a prefix in attention, a parallel adapter at the feed-forward.   He et al. 2021, arXiv 2110.04366.

Equation:
    Attention(q, [P_k; K], [P_v; V])   in every attention,   P made by a tanh network while it trains
    out = FFN(x) + s W_up relu(W_down x + b_down) + s b_up     at every feed-forward

This is the combination that the paper recommends ("mix and match"): a short prefix, which is enough to change the
attention, and most of the parameters at the feed-forward, where they help most. Both parts are the methods
`prefix_tuning` and `parallel_adapter` with the authors' sizes (code: jxhe/unify-parameter-efficient-tuning), and their
pages apply here: encoder, decoder and cross-attention have separate prefixes. The positions of tokens do not change,
since the authors' code does not put prefixes into a cache.

Parameters: those of both parts. With prefix_length k, prefix_mid_dim t and keys of width d: 2 d (t + 1) per attention
and k d + (d + 1) t per stack; with ffn_bottleneck r and hidden size e: 2 e r + r + e per feed-forward.

Start: Each part starts as its method does: the adapter is an exact identity, the prefix is not.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "mam_adapter")`, where a few percent of trained parameters are acceptable and merging is
not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import nn

from peftcore.author import Joins, LearningRate, Method, MethodConfig, Share, Surgeon, Tags
from peftcore_additive import parallel_adapter, prefix_tuning

PREFIX = {"prefix_length": "length", "prefix_mid_dim": "projection", "prefix_dropout": "dropout"}
FFN = {"ffn_bottleneck": "bottleneck", "ffn_scale": "scale", "ffn_dropout": "dropout", "ffn_joins": "joins"}
"""The options of the feed-forward part: their names here, and their names in `parallel_adapter`."""
BLOCKS = ("mlp.output", "mlp.down")


class MAMAdapterConfig(MethodConfig):
    """Options of the MAM adapter."""

    method: Literal["mam_adapter"] = "mam_adapter"
    prefix_length: PositiveInt = 30
    """Number of trained keys and values that are added in front of the keys and values of each attention."""
    prefix_mid_dim: PositiveInt | None = 800
    """Width of the network that generates the prefix in training; None trains the prefix directly."""
    prefix_dropout: Share = 0.0
    """Dropout probability of the prefix."""
    ffn_bottleneck: PositiveInt = 512
    """Width r of the adapter at the feed-forward."""
    ffn_scale: PositiveFloat | Literal["learned"] = 4.0
    """The factor s in front of the adapter; "learned" trains a separate s for each feed-forward, starting at 1."""
    ffn_dropout: Share = 0.0
    """Dropout probability of the bottleneck's activations."""
    ffn_joins: Joins = "stream"
    """Where the adapter's output is added. "stream": to the residual stream, after the host's dropout and layer scale
    of the feed-forward. "matrix": to the output of the feed-forward's last matrix, before these operations."""


def _translated(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names[name]: value for name, value in options.items() if name in names}


def prefix_options(config: MAMAdapterConfig) -> prefix_tuning.PrefixTuningConfig:
    """Return the options of the prefix."""
    overrides = {pattern: _translated(changes, PREFIX) for pattern, changes in config.overrides.items()}
    return prefix_tuning.PrefixTuningConfig(
        **_translated(config.model_dump(), PREFIX), behind=False, overrides=overrides
    )


def ffn_options(config: MAMAdapterConfig) -> parallel_adapter.ParallelAdapterConfig:
    """Return the options of the adapter at the feed-forward."""
    overrides = {pattern: _translated(changes, FFN) for pattern, changes in config.overrides.items()}
    return parallel_adapter.ParallelAdapterConfig(**_translated(config.model_dump(), FFN), overrides=overrides)


def _chosen(paths: list[str], surgeon: Surgeon) -> Callable[[str, nn.Module], bool] | None:
    """Return the target of a part: the given paths, which are from the user's target. Without a user's target, return
    None, so that the part uses its default target."""
    return None if surgeon.wishes.target is None else lambda path, module: path in paths


class MAMAdapter(Method):
    """Prefixes in attention and parallel adapters at feed-forwards under one name."""

    name = "mam_adapter"
    Config = MAMAdapterConfig
    tags = Tags(category="hybrid", paper="2110.04366", identity_at_init=False)
    learning_rate = LearningRate(
        5e-5, "jxhe/unify-parameter-efficient-tuning@3222ce2, exps/run_xsum.sh", on="BART-large, XSum"
    )
    target = ("attn.core", "cross.core", "mlp.output")
    config_version = 2
    former_defaults = ({"ffn_joins": "matrix"},)

    def inject(self, model: nn.Module, config: MAMAdapterConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        attentions = [site.module_path for site in sites if site.role not in BLOCKS]
        blocks = [site.module_path for site in sites if site.role in BLOCKS]
        if attentions or surgeon.wishes.target is surgeon.wishes.exclude is None:  # else the prefix says what is wrong
            chosen = _chosen(attentions, surgeon)
            surgeon.include("prefix", prefix_tuning.PrefixTuning(), prefix_options(config), chosen)
        if blocks:
            chosen = _chosen(blocks, surgeon)
            surgeon.include("ffn", parallel_adapter.ParallelAdapter(), ffn_options(config), chosen)

    @staticmethod
    def parameter_count(site: Any, config: MAMAdapterConfig) -> int:
        if site.form == "attention":
            return prefix_tuning.PrefixTuning.parameter_count(site, prefix_options(config))
        return parallel_adapter.ParallelAdapter.parameter_count(site, ffn_options(config))
