"""Sites of cross-attention to an image: its matrices, and the tokens that are made of an embedding."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from peftcore.author import Shared, Site, Surgeon, Tap
from peftcore.errors import UnsupportedSite


class Projection(nn.Module):
    """Maps an image embedding to tokens."""

    def __init__(self, inputs: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens, self.linear, self.norm = tokens, nn.Linear(inputs, tokens * width), nn.LayerNorm(width)

    def forward(self, embeds: Tensor) -> Tensor:
        parts: Tensor = self.norm(self.linear(embeds.to(self.linear.weight.dtype)).unflatten(-1, (self.tokens, -1)))
        return parts


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSite(Site):
    """The output matrix of a cross-attention as a site, with the matrices that belong to it."""

    heads: int = dataclasses.field(kw_only=True)
    key: Site = dataclasses.field(kw_only=True)
    value: Site = dataclasses.field(kw_only=True)
    query: Tap = dataclasses.field(kw_only=True)
    projection: Shared | None = dataclasses.field(kw_only=True)


def matrices(surgeon: Surgeon, out: Site) -> tuple[nn.Module, Site, Site, Site]:
    """Return the attention that an output matrix belongs to, and its matrices for queries, keys and values."""
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
        raise UnsupportedSite(f"{out.path} is in no cross-attention whose four matrices are modules that are called")
    return resolver.modules[path], parts[0], parts[1], parts[2]
