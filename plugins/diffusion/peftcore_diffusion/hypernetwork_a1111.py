"""Hypernetworks of AUTOMATIC1111's webui: networks that change the inputs of keys and values.   2022, no paper.

Equation:
    K = W_k (c + scale * f_k(c)),   V = W_v (c + scale * f_v(c)),   f(c) = W_2 a(W_1 c + b_1) + b_2

c [tokens, width] is the input of the matrices for keys and values: the text in cross-attention, the latents in
self-attention. All attentions whose c has the same width share one f_k and one f_v. The widths in Stable Diffusion 1.5
are 768, 320, 640 and 1280, as in the webui's default. `structure` lists the widths inside f, relative to the width of
c: [1, 2, 1] is W_1 [2 width, width] and W_2 [width, 2 width]. a is the activation; the default "linear" has none. As in
the webui, each layer is followed by the activation, by a layer norm if `norm` is set, and by dropout. The last layer is
followed by the activation only with `activate_output`, and never by dropout.

The webui's own files (.pt) are pickles, which peftcore does not read. ``torch.load(file, weights_only=True)[768]``
contains the state dicts of f_k and f_v for the width 768. Their tensors have the order of
``injection.shared["k768"].parameters()`` and ``injection.shared["v768"].parameters()``. If a file has no key
`activate_output`, pass ``activate_output=True``.

Parameters: two f for each width, each with in * out + out for every layer. With the default `structure` both f together
have 8 width^2 + 6 width. Each layer norm adds 2 out.

Start: Matrices and the gains of norms from N(0, 0.01), biases at zero. The start is an identity only with a scale of 0.

Differs from the authors' code: The webui applies its strength only in sampling; here `scale` acts in training too.

Use it: `peftcore.apply(model, "hypernetwork_a1111")`, to learn a style while the weights of the model must not change.
`lora` is stronger with fewer parameters, and can be merged; `textual_inversion` is smaller. The method supports any
attention with separate matrices for keys and values. It cannot be merged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from peftcore.author import (
    ACTIVATIONS,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
)
from peftcore.errors import ConfigError, UnsupportedSite


class HypernetworkA1111Config(MethodConfig):
    """Options of hypernetworks."""

    overridable = ()

    method: Literal["hypernetwork_a1111"] = "hypernetwork_a1111"
    scale: NonNegativeFloat = 1.0
    """The factor on the networks' outputs."""
    structure: list[PositiveFloat] = Field(default_factory=lambda: [1.0, 2.0, 1.0], min_length=2, max_length=32)
    """Widths of the layers of each network, relative to the width of its input. The first and the last must be 1."""
    activation: Literal["linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid"] = "linear"
    """The activation after each layer except the last; "linear" is the identity, "swish" is Hardswish."""
    activate_output: bool = False
    """Add the activation after the last layer too."""
    norm: bool = False
    """Add a layer norm after each layer."""
    dropout: Share = 0.0
    """Probability with which hidden values are dropped in training; the webui uses 0.3 if dropout is switched on."""
    start: Literal["normal", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"] = "normal"
    """The initialization of the matrices."""

    @model_validator(mode="after")
    def _ends(self) -> HypernetworkA1111Config:
        if self.structure[0] != 1 or self.structure[-1] != 1:
            raise ValueError(f"structure= must begin and end with 1, the width of the context; it is {self.structure}")
        return self


class HypernetworkOperator(Operator):
    """Adds a network's output to the input of one matrix that computes keys or values."""

    changes_inputs, only_inputs = True, True

    def __init__(self, site: Site, scale: float, network: Shared) -> None:
        super().__init__(site)
        self.scale, self.network = scale, network

    def forward(self, call: Callable[..., Any], context: Tensor) -> Any:
        dtype = next(self.network.module.parameters()).dtype
        return call(context + (self.scale * self.network.module(context.to(dtype))).to(context.dtype))


class HypernetworkA1111(Method):
    """Networks that change the inputs of keys and values, one pair of networks for each width of inputs."""

    name = "hypernetwork_a1111"
    Config = HypernetworkA1111Config
    tags = Tags(
        category="diffusion",
        paper="AUTOMATIC1111/stable-diffusion-webui",
        identity_at_init=False,
        identity_options={"scale": 0.0},
    )
    learning_rate = LearningRate(
        1e-5, "AUTOMATIC1111/stable-diffusion-webui@7c8a4cc, modules/ui.py", on="Stable Diffusion 1.5, one style"
    )
    target = ("attn.k", "attn.v", "cross.k", "cross.v")

    def inject(self, model: nn.Module, config: HypernetworkA1111Config, surgeon: Surgeon) -> None:
        parts = config.model_dump(include={"activation", "activate_output", "norm", "dropout", "start"})
        for site in surgeon.sites():
            part, width = (site.role or "").rpartition(".")[2], site.in_features
            if site.slices is not None or part not in ("k", "v") or len(site.weight_shape) != 2:
                raise UnsupportedSite(
                    f"{site.path or 'the host'} is not a matrix that computes only keys or only values; target attn.k, "
                    "attn.v, cross.k or cross.v"
                )
            widths = [int(width * factor) for factor in config.structure]
            if not all(widths):
                raise ConfigError(
                    f"structure={config.structure} leaves nothing of the {width} features that {site.path} reads; use "
                    "larger factors"
                )
            network = surgeon.own(f"{part}{width}", functools.partial(ContextNetwork, widths, **parts))
            surgeon.graft(site, HypernetworkOperator, scale=config.scale, network=network)

    @staticmethod
    def parameter_count(site: Site, config: HypernetworkA1111Config) -> int:
        return 0  # the networks belong to no site


OF_WEBUI: dict[str, Callable[[], nn.Module]] = {
    **{name: ACTIVATIONS[name] for name in ("relu", "tanh", "sigmoid")},
    "linear": nn.Identity,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,
}
"""Functions that create the module of an activation, by the activation's name in the webui."""
STARTS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda weight: nn.init.normal_(weight, std=0.01),
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
}


class Stage(nn.Module):
    """One linear layer, followed by the activation and the norm."""

    def __init__(self, width: int, out: int, activation: str, norm: bool, start: str) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        STARTS[start](self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.activation = OF_WEBUI[activation]()
        self.norm = nn.LayerNorm(out) if norm else nn.Identity()
        for gain in [*self.norm.parameters()][:1]:
            nn.init.normal_(gain, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's output."""
        y: Tensor = self.norm(self.activation(self.linear(x)))
        return y


class ContextNetwork(nn.Module):
    """A network of linear stages between the given widths. Its tensors have the same order as in files of the webui,
    but their names do not depend on dropout."""

    def __init__(
        self, widths: list[int], activation: str, activate_output: bool, norm: bool, dropout: float, start: str
    ) -> None:
        super().__init__()
        ends = [activation] * (len(widths) - 2) + [activation if activate_output else "linear"]
        sizes = zip(widths, widths[1:], ends, strict=False)
        self.dropout, self.stages = dropout, nn.ModuleList(Stage(*size, norm, start) for size in sizes)

    def forward(self, context: Tensor) -> Tensor:
        """Return f(c) for an input c ``[..., width]``."""
        for number, stage in enumerate(self.stages):
            if number and self.training and self.dropout:
                context = nn.functional.dropout(context, self.dropout)
            context = stage(context)
        return context
