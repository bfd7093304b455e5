"""Serial bottleneck adapter.   Houlsby et al. 2019, arXiv 1902.00751.

    y = h + W_up f(W_down h + b_down) + b_up,   W_down [r, d],  W_up [d, r]

h is what a sub-block (attention, then feed-forward) is about to add to the residual stream: the output of its last
matrix, behind the host's dropout, as in the authors' code (google-research/adapter-bert), behind layer scale and
stochastic depth, and before residual and norm; `joins` says so. For mixtures of experts it is the output of the whole
mixture, in blocks of convolutions that of the last one, where the adapter acts on the channels of each position. All
norms train too, that of the embeddings as well, as in the authors' code. Both matrices start from a normal with
standard deviation 1e-3, cut at two deviations, biases zero: near identity, not exactly.

With ``target="block"`` h is what a whole block returns, and with `norm` the adapter reads LN(h), a layer norm of its
own: the adapter of Bapna and Firat 2019 (`residual_adapter_nmt`). With ``side="stream"`` h is the stream's side of a
matrix: what the first matrices of a branch read, x' = x + W_up f(W_down x), y = W x', and what the last one returns, as
LLM-Adapters has it (`llm_adapters_series`).

Parameters: 2 d r + r + d an adapter, two adapters a block; without `bias` 2 d r; with `norm` 2 d more, with a learned
`scale` 1 or d; with `train_layer_norm`, the norms besides.

Use it where a small non-linear module is worth a little latency: it cannot be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    OUTPUTS,
    BlockSite,
    BranchSite,
    Joins,
    LearningRate,
    Method,
    MethodConfig,
    Site,
    Surgeon,
    Tags,
    branch_end,
    reads_stream,
    with_blocks,
)
from peftcore.errors import UnsupportedSite
from peftcore_additive._bottleneck import Scale, ScaledOperator, Start, learned_scale, width_of


class Config(MethodConfig):
    """Options of the serial adapter."""

    method: Literal["houlsby_adapter"] = "houlsby_adapter"
    bottleneck: PositiveInt = 64
    """Width r of the bottleneck."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"] = "gelu"
    """The non-linearity f; "gelu_tanh" is the approximation of GELU that the authors' code has."""
    train_layer_norm: bool | Literal["blocks"] = True
    """Train all norms along, or those of the blocks alone."""
    joins: Joins = "stream"
    """Where it reads and adds: behind what the host does to a branch's output (dropout, layer scale, stochastic depth),
    or at the branch's last matrix, in front of that."""
    side: Literal["outputs", "inputs", "stream"] = "outputs"
    """The side of the target on which it stands: behind it, in front of it, or where the stream is: in front of the
    first matrices of a branch, behind all others."""
    norm: bool = False
    """A layer norm of its own in front of W_down, which trains with it."""
    bias: bool = True
    """Biases behind both matrices."""
    scale: Scale = 1.0
    """A factor in front of what the adapter adds: a number, one that is "learned" from 1, or a vector of those, one for
    each "channel"."""
    stochastic_depth: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability with which a row of the batch goes without the adapter in training; what others get is scaled up."""
    init: Start = "cut"
    """The draw of both matrices: a normal that is cut at two standard deviations, or a whole one."""
    init_std: NonNegativeFloat = 1e-3
    """Standard deviation of W_down at the start."""
    up_init_std: NonNegativeFloat = 1e-3
    """Standard deviation of W_up at the start; 0 makes a fresh adapter an exact identity."""


class SerialOperator(ScaledOperator):
    """The adapter behind its target, or around a block."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site, config, norm=config.norm, bias=config.bias)


class InFrontOperator(SerialOperator):
    """The adapter in front of its target."""

    changes_inputs = True

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return call(self.adapt(x), *args, **kwargs)


def _inputs_of(site: Site) -> int:
    """Return the number of features that a target reads.

    Raises:
        UnsupportedSite: it reads tokens, or it is a part of a matrix, and all parts read the same.
    """
    if site.layer.one_hot or site.slices is not None:
        raise UnsupportedSite(f"{site.path}: nothing stands in front of it alone; an adapter can stand behind it")
    return site.in_features


class HoulsbyAdapter(Method):
    """Serial bottleneck adapters after attention and feed-forward."""

    name = "houlsby_adapter"
    Config = Config
    tags = Tags(category="additive", paper="1902.00751", identity_at_init=False, identity_options={"up_init_std": 0.0})
    learning_rate = LearningRate(3e-4, "google-research/adapter-bert@1a31fc6, README.md", on="BERT-base, MRPC")
    target = ("attn.output", "mlp.output")
    alternatives = OUTPUTS
    config_version = 2

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        norms = "blocks" if options.get("train_layer_norm", True) else False
        return {"joins": "matrix", **options, "train_layer_norm": norms}  # what version 1 trained, and where it stood

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in with_blocks(surgeon, each_run=True):
            self._adapt(site, config, surgeon)
        for site in surgeon.at("norm" if config.train_layer_norm == "blocks" else "norm.*"):
            if config.train_layer_norm:
                surgeon.train(site.module_path)

    @staticmethod
    def _adapt(site: Site, config: Config, surgeon: Surgeon) -> None:
        own = config.at(site.path)
        if isinstance(site, BlockSite):
            surgeon.graft(site, SerialOperator, config)
        elif own.side == "inputs" or (own.side == "stream" and reads_stream(surgeon, site)):
            surgeon.graft(BranchSite(**vars(site), width=_inputs_of(site)), InFrontOperator, config)
        else:
            place = branch_end(surgeon, site, own.joins)
            surgeon.graft(place, SerialOperator, config, place.places)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        if site.form == "weight":  # a norm's gain or bias
            return site.numel
        d, r = width_of(site), config.bottleneck
        return 2 * d * r + (r + d) * config.bias + 2 * d * config.norm + learned_scale(config.scale, d)
