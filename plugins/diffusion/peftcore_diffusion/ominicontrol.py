"""OminiControl: the tokens of a condition image next to those of the image.   Tan et al. 2024, arXiv 2411.15098.

Equation:
    [text; x; c] = L([text; x; c])   in each block L of a diffusion transformer; text and x modulated by t, c by t = 0
    y = W c + B A c                  for the tokens c of the condition alone; y = W x for all others

c are the tokens of the condition image, which the transformer's own embedding computes. c attends to the text and the
image, and both attend to c. The output for c after the last block is discarded.

Pass the condition to a call: ``with peftcore.call(model, condition=c): ...``. It has the form of the model's own image
input: in Flux packed latents [batch or 1, tokens, channels], in other models [batch or 1, channels, height, width]. In
Flux the tokens of c have the positions of the image's tokens, or the positions that the call passes as
``condition_ids=`` [tokens, 3]. They are scaled by `position_scale` and then moved by `position_delta`. Keep
`position_delta` at (0, 0) if both images show the same scene (edges, depth); use (0, -width) for a subject at another
place.

With `independent` c attends only to itself (feature reuse of OminiControl2, arXiv 2503.08280). In a model with
distilled guidance, the guidance of c is 1. SD3, PixArt and DiT are supported in the same way as Flux, with each model's
own grid of positions. The method cannot be merged. A forward takes as much time as with a second image.

Parameters: rank * (in * kernel + out) a site. By default the sites are the matrices that embed, modulate and project
the image, and the last matrices of branches. Matrices of the text are left out.

Start: A ~ N(0, 1 / rank^2), B at zero, scale 1. No start is an identity, since the image attends to c from the start.

Differs from the authors' code: The authors' training scales positions first and then moves them, as here; their
pipeline does both in the other order. Their code uses the scale 1 and ignores lora_alpha, and supports only Flux. The
paper's attention bias, which reduces the effect of a condition, was removed from their code, and is not here.

Use it: `peftcore.apply(model, "ominicontrol")`, on a diffusion transformer, to control both edges and subjects, with
0.1 % of its parameters. For a UNet use `controlnet` or `ip_adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    RowStream,
    Site,
    StreamSite,
    Surgeon,
    Tags,
    Turn,
    add_stream,
    forward_context,
    stream_sites,
)
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore_diffusion._told import told


class OminiControlConfig(MethodConfig):
    """Options of OminiControl."""

    method: Literal["ominicontrol"] = "ominicontrol"
    rank: PositiveInt = 4
    """Rank of the update."""
    position_delta: tuple[int, int] = (0, 0)
    """The shift of the condition's positions, in rows and columns of tokens; only in Flux."""
    position_scale: PositiveFloat = 1.0
    """The factor on the condition's positions, for a condition image at a lower resolution than the image; only in
    Flux."""
    independent: bool = False
    """Let the condition attend only to itself, and not to image or text."""
    input: str = "condition"
    """The name under which calls pass the condition: ``peftcore.call(model, condition=c)`` by default."""


class ConditionStream(RowStream):
    """Runs the tokens of the condition through the transformer, with their own positions, timestep and guidance."""

    def __init__(self, site: StreamSite, config: OminiControlConfig) -> None:
        super().__init__(site)
        self.name, self.sees_tokens = config.input, not config.independent
        self.delta, self.scale = config.position_delta, config.position_scale
        if "img_ids" not in site.arguments and (any(self.delta) or self.scale != 1):
            raise UnsupportedSite(
                f"{site.module_path or 'the host'} computes positions itself: leave position_delta and position_scale "
                "at their defaults"
            )

    def second(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        image = given["hidden_states"]
        condition = told(self.name, len(image)).to(image)
        second = {**given, "hidden_states": condition, "timestep": torch.zeros_like(given["timestep"])}
        if given.get("guidance") is not None:
            second["guidance"] = torch.ones_like(given["guidance"])
        if given.get("img_ids") is not None:
            places = given["img_ids"]
            second["img_ids"] = self._places(places if places.dim() == 2 else places[0], condition)
        return second

    def _places(self, places: Tensor, condition: Tensor) -> Tensor:
        """Return the positions of the condition's tokens, [tokens, 3], given the positions of the image's tokens."""
        own = forward_context().context.get(f"{self.name}_ids")
        places = (places if own is None else own.to(places)).clone()
        if len(places) != condition.shape[1]:
            raise ConfigError(
                f"{self.name} has {condition.shape[1]} tokens, but there are {len(places)} positions: pass "
                f"{self.name}_ids= [tokens, 3] too"
            )
        places[:, 1:] = places[:, 1:] * self.scale + (self.scale - 1) / 2
        places[:, 1:] += places.new_tensor(self.delta)
        return places


class ConditionOperator(Operator):
    """The update of one matrix, for the tokens of the condition."""

    padded = frozenset({"A", "B"})

    def __init__(self, site: Site, config: OminiControlConfig, turn: Turn) -> None:
        super().__init__(site)
        self.turn = turn
        self.A = nn.Parameter(torch.randn(config.rank, site.in_features, *site.kernel) / config.rank)
        self.B = nn.Parameter(torch.zeros(site.out_features, config.rank))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        if not self.turn.is_now():
            return y
        A, B = self.cast(y, self.A, self.B)
        return y + self.layer.mix(self.layer.apply(x, A), B)


class OminiControl(Method):
    """A condition image as tokens, with LoRA that acts only on these tokens.

    Example:
        injection = peftcore.apply(model, "ominicontrol")
        peftcore.call(model, condition=torch.randn(1, 16, 16))  # in the form of the model's own image input
    """

    name = "ominicontrol"
    Config = OminiControlConfig
    tags = Tags(category="diffusion", paper="2411.15098", identity_at_init=False, per_row=False, reentrant=False)
    learning_rate = LearningRate(
        1e-4,
        "Yuanshi9815/OminiControl@331dd34, train/config/spatial_alignment.yaml",
        on="FLUX.1-dev, edges of Canny; the AdamW of a comment there: the file itself has Prodigy, with a rate of 1",
    )
    target = (
        r"re:(.*\.)?(x_embedder|pos_embed\.proj"
        r"|transformer_blocks\.\d+\.(norm1\.linear|attn1?\.to_[qkv]|attn1?\.to_out\.0|ff\.net\.2)"
        r"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv]))",
    )

    def inject(self, model: nn.Module, config: OminiControlConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        streams = {
            site.module_path: add_stream(surgeon, site, ConditionStream, config)
            for site in stream_sites(surgeon, [site.module_path for site in sites])
        }
        for site in sites:
            owner = max((path for path in streams if _holds(path, site)), key=len, default=None)
            if owner is None or site.form != "activation":
                raise UnsupportedSite(
                    f"{site.path or 'the host'} is not a module of a diffusion transformer; exclude it"
                )
            surgeon.graft(site, ConditionOperator, config, turn=streams[owner].turn)

    @staticmethod
    def parameter_count(site: Site, config: OminiControlConfig) -> int:
        inside = site.form == "activation"  # no stream, and no attention
        return config.rank * (site.numel // site.out_features + site.out_features) if inside else 0


def _holds(path: str, site: Site) -> bool:
    return not path or site.module_path.startswith(f"{path}.")
