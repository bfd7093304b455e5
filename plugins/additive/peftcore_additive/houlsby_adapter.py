"""Serial bottleneck adapter.   Houlsby et al. 2019, arXiv 1902.00751.

Equation:
    y = h + W_up f(W_down h + b_down) + b_up,   W_down [r, d],  W_up [d, r]

h is the output of a sub-block (attention or feed-forward): by default after the host's dropout, layer scale and
stochastic depth, and before the residual sum and norm. With joins="matrix" h is the output of the sub-block's last
matrix. For mixtures of experts h is the output of the whole mixture. In blocks of convolutions h is the output of the
last convolution, and the adapter acts on the channels of each position. All norms train too, including the norm of the
embeddings.

With ``target="block"`` h is the output of a whole block. With `norm` the adapter reads LN(h), where LN is a trained
layer norm. Both together are the adapter of Bapna and Firat 2019 (`residual_adapter_nmt`). With ``side="stream"`` the
adapter changes the input of the first matrices of a branch, x' = x + W_up f(W_down x), y = W x', and the output of the
last matrix, as in LLM-Adapters (`llm_adapters_series`).

Parameters: 2 d r + r + d an adapter, or 2 d r without `bias`; a block has two adapters. `norm` adds 2 d to an adapter,
a learned `scale` adds 1 or d. With `train_layer_norm` the norms of the host are added.

Start: Both matrices start from a normal distribution with standard deviation 1e-3, truncated at two deviations, biases
at zero. This is nearly an identity; ``up_init_std=0`` makes it exact.

Differs from the authors' code: No difference is known (google-research/adapter-bert).

Use it: `peftcore.apply(model, "houlsby_adapter")`, where a small non-linear module is worth a little latency: it cannot
be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    OUTPUTS,
    BlockSite,
    BranchSite,
    Joins,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    branch_end,
    reads_stream,
    with_blocks,
)
from peftcore.errors import UnsupportedSite
from peftcore_additive._bottleneck import Scale, ScaledOperator, Start, learned_scale, width_of


class HoulsbyAdapterConfig(MethodConfig):
    """Options of the serial adapter."""

    method: Literal["houlsby_adapter"] = "houlsby_adapter"
    bottleneck: PositiveInt = 64
    """Width r of the bottleneck."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"] = "gelu"
    """The non-linearity f; "gelu_tanh" is the approximation of GELU that the authors' code has."""
    train_layer_norm: bool | Literal["blocks"] = True
    """The norms of the host that train too: all (True), only those of the blocks ("blocks"), or none (False)."""
    joins: Joins = "stream"
    """Where the adapter reads and adds: after the host's dropout, layer scale and stochastic depth on a branch's output
    ("stream"), or before them, at the branch's last matrix ("matrix")."""
    side: Literal["outputs", "inputs", "stream"] = "outputs"
    """The tensor that the adapter changes: the target's outputs, or its inputs. "stream" chooses the inputs for the
    first matrices of a branch, and the outputs for all other targets."""
    norm: bool = False
    """Put a trained layer norm in front of the adapter's first matrix W_down."""
    bias: bool = True
    """Add biases to both matrices."""
    scale: Scale = 1.0
    """The factor on the adapter's output: a number, a "learned" scalar, or a learned factor for each "channel"; learned
    factors start at 1."""
    stochastic_depth: Share = 0.0
    """Probability with which a row of the batch skips the adapter in training; the adapter's output for the remaining
    rows is scaled up."""
    init: Start = "cut"
    """The distribution from which both matrices start: a normal distribution, truncated at two standard deviations
    ("cut") or not ("normal")."""
    init_std: NonNegativeFloat = 1e-3
    """Standard deviation of W_down at the start."""
    up_init_std: NonNegativeFloat = 1e-3
    """Standard deviation of W_up at the start; 0 makes a fresh adapter an exact identity."""


class SerialOperator(ScaledOperator):
    """Applies the adapter to the output of its target module or block."""

    def __init__(self, site: Site, config: HoulsbyAdapterConfig) -> None:
        super().__init__(site, config, norm=config.norm, bias=config.bias)


class InFrontOperator(SerialOperator):
    """Applies the adapter to the input of its target."""

    changes_inputs = True

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return call(self.adapt(x), *args, **kwargs)


def _inputs_of(site: Site) -> int:
    """Return the number of features that a target reads.

    Raises:
        UnsupportedSite: the target reads token ids, or it is one slice of a matrix; all slices read the same input.
    """
    if site.layer.one_hot or site.slices is not None:
        raise UnsupportedSite(
            f'{site.path} has no input that an adapter could change for it alone; adapt its output (side="outputs")'
        )
    return site.in_features


class HoulsbyAdapter(Method):
    """Serial bottleneck adapters after attention and feed-forward."""

    name = "houlsby_adapter"
    Config = HoulsbyAdapterConfig
    tags = Tags(category="additive", paper="1902.00751", identity_at_init=False, identity_options={"up_init_std": 0.0})
    learning_rate = LearningRate(3e-4, "google-research/adapter-bert@1a31fc6, README.md", on="BERT-base, MRPC")
    target = ("attn.output", "mlp.output")
    alternatives = OUTPUTS
    config_version = 2

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        norms = "blocks" if options.get("train_layer_norm", True) else False
        return {"joins": "matrix", **options, "train_layer_norm": norms}  # what version 1 trained, and where it stood

    def inject(self, model: nn.Module, config: HoulsbyAdapterConfig, surgeon: Surgeon) -> None:
        for site in with_blocks(surgeon, each_run=True):
            self._adapt(site, config, surgeon)
        for site in surgeon.at("norm" if config.train_layer_norm == "blocks" else "norm.*"):
            if config.train_layer_norm:
                surgeon.train(site.module_path)

    @staticmethod
    def _adapt(site: Site, config: HoulsbyAdapterConfig, surgeon: Surgeon) -> None:
        own = config.at(site.path)
        if isinstance(site, BlockSite):
            surgeon.graft(site, SerialOperator, config)
        elif own.side == "inputs" or (own.side == "stream" and reads_stream(surgeon, site)):
            surgeon.graft(BranchSite(**vars(site), width=_inputs_of(site)), InFrontOperator, config)
        else:
            place = branch_end(surgeon, site, own.joins)
            surgeon.graft(place, SerialOperator, config, place.places)

    @staticmethod
    def parameter_count(site: Site, config: HoulsbyAdapterConfig) -> int:
        if site.form == "weight":  # a norm's gain or bias
            return site.numel
        d, r = width_of(site), config.bottleneck
        return 2 * d * r + (r + d) * config.bias + 2 * d * config.norm + learned_scale(config.scale, d)
