"""IP-Adapter: an image as a prompt, by a separate cross-attention.   Ye et al. 2023, arXiv 2308.06721.

Equation:
    y = W_o (Attention(q, W_k c, W_v c) + scale * Attention(q, K e, V e))

c are the tokens of the text and e [tokens, dim] those of the image. Pass the image to a call: ``with
peftcore.call(model, image_tokens=e): ...``, one image for each row or one for all rows. With `embed_dim`, pass CLIP's
``image_embeds`` [batch, embed_dim] instead; a trained projection computes e from them: LN(W x + b), cut into `tokens`
parts. For rows without an image (half of a batch under classifier-free guidance) pass an embedding of zeros.
``image_scale=`` in the same call replaces `scale`.

If your image encoder has a resampler, pass the resampler's output as ``image_tokens``. The method cannot be merged.

Parameters: 2 * inner * dim for each attention, where inner is the width of all heads. With `embed_dim`, the projection
adds dim * (tokens * (embed_dim + 1) + 2).

Start: K starts as W_k and V as W_v. If the image tokens have another width than the text tokens (`image_dim`), K and V
start as torch's linear layers do. The start is an identity only with a scale of 0.

Differs from the authors' code: The resampler of the variant "Plus" is not implemented. The authors' code was not
compared. No difference from diffusers is known.

Use it: `peftcore.apply(model, "ip_adapter")`, to control generation by a picture. The attention to the text does not
change.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    forward_context,
)
from peftcore.errors import UnsupportedSite
from peftcore_diffusion._told import told


class IPAdapterConfig(MethodConfig):
    """Options of IP-Adapter."""

    method: Literal["ip_adapter"] = "ip_adapter"
    scale: NonNegativeFloat = 1.0
    """The factor on the attention to the image, unless a call passes ``image_scale=``."""
    image_dim: PositiveInt | None = None
    """Width of the image tokens; None: the width of the text's tokens."""
    embed_dim: PositiveInt | None = None
    """Width of the image embeddings that calls pass as ``image_embeds``; None: calls pass ``image_tokens``."""
    tokens: PositiveInt = 4
    """Number of tokens that the projection computes from one embedding."""


class Projection(nn.Module):
    """Maps an image embedding to tokens."""

    def __init__(self, inputs: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens, self.linear, self.norm = tokens, nn.Linear(inputs, tokens * width), nn.LayerNorm(width)

    def forward(self, embeds: Tensor) -> Tensor:
        """Return the tokens ``[batch, tokens, width]`` of an embedding ``[batch, inputs]``."""
        parts: Tensor = self.norm(self.linear(embeds.to(self.linear.weight.dtype)).unflatten(-1, (self.tokens, -1)))
        return parts


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSite(Site):
    """The output matrix of a cross-attention as a site, together with the other matrices of that attention."""

    heads: int = dataclasses.field(kw_only=True)
    key: Site = dataclasses.field(kw_only=True)
    value: Site = dataclasses.field(kw_only=True)
    query: Tap = dataclasses.field(kw_only=True)
    projection: Shared | None = dataclasses.field(kw_only=True)


def matrices(surgeon: Surgeon, out: Site) -> tuple[nn.Module, Site, Site, Site]:
    """Return the attention that contains an output matrix, and its matrices for queries, keys and values.

    Raises:
        UnsupportedSite: the matrix is not in a cross-attention whose four matrices are modules that are called.
    """
    resolver, path = surgeon.resolver, out.module_path
    parts: list[Site] = []
    while not parts and (path := path.rpartition(".")[0]):
        parts = [
            dataclasses.replace(resolver.site(entry.module, entry.tensor or "weight", entry.role), meta=out.meta)
            for part in ("q", "k", "v")
            for entry in resolver.host.entries
            if entry.role == f"cross.{part}" and entry.module.startswith(f"{path}.")
        ]
    if out.role != "cross.out" or len(parts) != 3 or {each.form for each in (out, *parts)} != {"activation"}:
        raise UnsupportedSite(
            f"{out.path} is not in a cross-attention whose four matrices are modules that are called; exclude it"
        )
    return resolver.modules[path], parts[0], parts[1], parts[2]


class QueryOperator(Operator):
    """Stores the queries of an attention, for its attention to the image."""

    def __init__(self, site: Site, query: Tap) -> None:
        super().__init__(site)
        self.query = query

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        self.query.put(y)
        return y


class IPAdapterOperator(Operator):
    """Computes the attention to the image, and adds it to the input of the output matrix."""

    def __init__(self, site: ImageSite, config: IPAdapterConfig) -> None:
        super().__init__(site)
        self.scale, self.heads, self.query, self.projection = config.scale, site.heads, site.query, site.projection
        self.key, self.value = (_start(each, config.image_dim or each.in_features) for each in (site.key, site.value))

    def forward(self, call: Callable[..., Tensor], h: Tensor) -> Tensor:
        query = self.query.take()
        if self.projection is None:
            tokens = told("image_tokens", len(h))
        else:
            tokens = self.projection.module(told("image_embeds", len(h)))
        tokens, key, value = self.cast(query, tokens, self.key, self.value)
        parts = (query, nn.functional.linear(tokens, key), nn.functional.linear(tokens, value))
        q, k, v = (self._by_head(part) for part in parts)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        scale = forward_context().context.get("image_scale", self.scale)
        return call(h + scale * attended.transpose(1, 2).flatten(2).to(h.dtype))

    def _by_head(self, part: Tensor) -> Tensor:
        return part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, tokens, inner / heads]


def _start(site: Site, width: int) -> nn.Parameter:
    if width == site.in_features:
        return nn.Parameter(site.weight().detach().clone())
    return nn.Parameter(torch.empty(site.out_features, width).uniform_(-1, 1) / math.sqrt(width))


class IPAdapter(Method):
    """Decoupled cross-attention to an image.

    Example:
        injection = peftcore.apply(model, "ip_adapter", embed_dim=48)
        peftcore.call(model, image_embeds=torch.randn(1, 48))  # from an image encoder
    """

    name = "ip_adapter"
    Config = IPAdapterConfig
    tags = Tags(category="diffusion", paper="2308.06721", identity_at_init=False, identity_options={"scale": 0.0})
    learning_rate = LearningRate(1e-4, "tencent-ailab/IP-Adapter@62e4af9, README.md", on="Stable Diffusion 1.5")
    target = ("cross.out",)

    def inject(self, model: nn.Module, config: IPAdapterConfig, surgeon: Surgeon) -> None:
        for out in surgeon.sites():
            attention, query, key, value = matrices(surgeon, out)
            heads: Any = getattr(attention, "heads", None)
            if not isinstance(heads, int) or query.out_features != key.out_features:
                raise UnsupportedSite(
                    f"{out.path} is not in an attention of diffusers with as many key heads as query heads; exclude it"
                )
            width, projection = config.image_dim or key.in_features, None
            if config.embed_dim is not None:
                make = functools.partial(Projection, config.embed_dim, config.tokens, width)
                projection = surgeon.own(f"projection{width}", make)
            queries = Tap()
            site = ImageSite(**vars(out), heads=heads, key=key, value=value, query=queries, projection=projection)
            surgeon.graft(query, QueryOperator, query=queries)
            surgeon.graft(site, IPAdapterOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: IPAdapterConfig) -> int:
        if not isinstance(site, ImageSite):  # the queries, which are read only
            return 0
        return 2 * site.key.out_features * (config.image_dim or site.key.in_features)
