"""Visual prompts in diffusion transformers with a text input (SD3, Flux, PixArt). These transformers modulate and
rotate the image tokens and arrange them on a grid, so no rows can be inserted among them. Therefore the prompt is a
separate sequence of rows (a stream) without positions, parallel to the image tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import RowStream, Shared, StreamSite, Surgeon, add_stream, stream_sites
from peftcore.errors import UnsupportedSite
from peftcore_vision._prompts import PromptConfig, PromptSite, shared_projection


def add_prompt_stream(surgeon: Surgeon, sites: list[PromptSite], config: PromptConfig, deep: bool) -> bool:
    """Return whether the blocks belong to a diffusion transformer with a text input. If so, add a prompt to it, as a
    separate sequence (stream) parallel to the image. With `deep` each block has a separate prompt. Heads stay frozen,
    since they do not score classes."""
    blocks = [site.module_path for site in sites]
    try:
        (stream,) = stream_sites(surgeon, blocks)
    except UnsupportedSite:
        return False
    if not stream.text:
        return False
    projection = shared_projection(surgeon, sites[0], config.at(stream.path))
    own = {"patch": sites[0].patch, "projection": projection, "deep": deep}
    add_stream(surgeon, stream.only(blocks), PromptStream, config, **own)
    return True


class PromptStream(RowStream):
    """A prompt that passes through all blocks, or with `deep` a separate prompt for each block."""

    def __init__(
        self, site: StreamSite, config: PromptConfig, patch: int, projection: Shared | None, deep: bool
    ) -> None:
        super().__init__(site)
        width = config.projection or site.width
        bound = math.sqrt(6 / (patch + width))
        self.order = {path: number for number, path in enumerate(site.blocks)} if deep else None
        sizes = (len(site.blocks),) if deep else ()
        self.prompt = nn.Parameter(torch.empty(*sizes, config.length, width).uniform_(-bound, bound))
        self.projection, self.dropout = projection, nn.Dropout(config.dropout)

    def first(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        prompt = self.prompt if self.order is None else self.prompt[0]
        return self.alike(given, self._dropped(prompt, given["hidden_states"]))

    def at_block(self, block: str, rows: Tensor) -> Tensor:
        return rows if self.order is None else self._dropped(self.prompt[self.order[block]], rows)

    def _dropped(self, prompt: Tensor, like: Tensor) -> Tensor:
        (rows,) = self.cast(like, prompt if self.projection is None else self.projection.module(prompt))
        dropped: Tensor = self.dropout(rows.expand(len(like), -1, -1))
        return dropped
