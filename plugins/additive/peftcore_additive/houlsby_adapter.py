"""Serial bottleneck adapter.   Houlsby et al. 2019, arXiv 1902.00751.

    y = h + W_up f(W_down h + b_down) + b_up,   W_down [r, d],  W_up [d, r]

h is what a sub-block (attention, then feed-forward) is about to add to the residual stream: the output of its last
matrix, behind the host's dropout, as in the authors' code (google-research/adapter-bert), behind layer scale and
stochastic depth, and before residual and norm; `joins` says so. For mixtures of experts it is the output of the whole
mixture, in blocks of convolutions that of the last one, where the adapter acts on the channels of each position. All
norms train too, that of the embeddings as well, as in the authors' code. Both matrices start from a normal with
standard deviation 1e-3, cut at two deviations, biases zero: near identity, not exactly.

Parameters: 2 d r + r + d an adapter, two adapters a block; with `train_layer_norm`, the norms besides.

Use it where a small non-linear module is worth a little latency: it cannot be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore import OUTPUTS, AtBranchEnd, Joins, LearningRate, Method, MethodConfig, Site, Surgeon, Tags, branch_end

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Config(MethodConfig):
    """Options of the serial adapter."""

    method: Literal["houlsby_adapter"] = "houlsby_adapter"
    bottleneck: PositiveInt = 64
    """Width r of the bottleneck."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """The non-linearity f."""
    train_layer_norm: bool | Literal["blocks"] = True
    """Train all norms along, or those of the blocks alone."""
    joins: Joins = "stream"
    """Where it reads and adds: behind what the host does to a branch's output (dropout, layer scale, stochastic depth),
    or at the branch's last matrix, in front of that."""
    init_std: NonNegativeFloat = 1e-3
    """Standard deviation of W_down at the start."""
    up_init_std: NonNegativeFloat = 1e-3
    """Standard deviation of W_up at the start; 0 makes a fresh adapter an exact identity."""


def _narrow_normal(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std) if std else nn.init.zeros_(weight)


class BottleneckOperator(AtBranchEnd):
    """Adds a bottleneck to the output of a branch (the first entry, where attention returns a tuple)."""

    stackable = True
    padded = frozenset({"down.weight", "down.bias", "up.weight"})

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__(site)
        self.down = nn.Linear(site.out_features, config.bottleneck)
        self.activation = ACTIVATIONS[config.activation]()
        self.up = nn.Linear(config.bottleneck, site.out_features)
        for linear, std in ((self.down, config.init_std), (self.up, config.up_init_std)):
            _narrow_normal(linear.weight, std)
            nn.init.zeros_(linear.bias)

    def adapt(self, h: Tensor) -> Tensor:
        down, down_bias, up, up_bias = self.cast(h, self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        channels = self.layer.channel_dim
        inner = self.activation(nn.functional.linear(h.movedim(channels, -1), down, down_bias))  # [..., r]
        return h + nn.functional.linear(inner, up, up_bias).movedim(-1, channels)


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
        for site in surgeon.sites():
            place = branch_end(surgeon, site, config.at(site.path).joins)
            surgeon.graft(place, BottleneckOperator, config, place.places)
        for site in surgeon.at("norm" if config.train_layer_norm == "blocks" else "norm.*"):
            if config.train_layer_norm:
                surgeon.train(site.module_path)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        if site.form == "weight":  # a norm's gain or bias
            return site.numel
        return 2 * site.out_features * config.bottleneck + config.bottleneck + site.out_features
