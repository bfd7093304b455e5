"""The attention of a block of images once more, across the frames of clips: where it reads, and where it joins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Operator, Site, Surgeon, Tap, branch_end, is_post_norm, on_first
from peftcore.errors import UnsupportedSite
from peftcore_vision._frames import clips
from peftcore_vision._patches import patch_sites
from peftcore_vision._prompts import PromptSite

NORM, END, PATCH = "norm", "end", "patch"
"""The forms of the norms of a block, of the module behind which attention joins the stream, and of the convolution that
embeds patches."""


@dataclass(frozen=True, eq=False)
class PlaceSite(Site):
    """A module through which tokens go."""

    width: int = 0
    """Number of features of the tokens."""
    embeds: bool = False
    """Whether the module is behind the embeddings, in front of all blocks."""

    @property
    def weight_shape(self) -> torch.Size:
        """The width, which plans and files record as the shape."""
        return torch.Size([self.width])


class AcrossOperator(Operator):
    """Acts at an attention of tokens to themselves that reads what a norm makes of the stream, and adds to that stream
    in front of the norm.

    Args:
        site: the attention.
        frames: of a clip.
        ends: whether it joins the stream behind another module, outside of the attention.
    """

    observes = frozenset({NORM})

    def __init__(self, site: PlaceSite, frames: int, ends: bool) -> None:
        super().__init__(site)
        self.frames, self.path = frames, site.path
        self.norm, self.behind, self.joins = Tap(), Tap(), Tap() if ends else None

    def across(self, attend: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """Return what is added to the stream.

        Args:
            attend: the attention, of any sequences ``[batch, length, d]``.
            y: the normed stream by places, ``[clips * tokens, frames, d]``, to which the result is also added.
        """
        raise NotImplementedError

    def within(self, y: Tensor) -> Tensor:
        """Return what the attention's output ``[rows, tokens, d]`` becomes."""
        raise NotImplementedError

    def drop(self, added: Tensor) -> Tensor:
        """Return what is added to the stream, ``[rows, tokens, d]``, as it is dropped in training."""
        return added

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return {NORM: self._at_norm, END: self._at_end}.get(form, self)

    def _at_norm(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = call(x, *args, **kwargs)
        if self.behind.take() is None:  # what stands behind the attention is none of its norms
            self.norm.take()
            self.norm.put((call, x, y))
        return y

    def forward(self, call: Callable[..., Any], y: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = self.norm.take()
        if normed is None or normed[2] is not y or y.dim() != 3:
            raise UnsupportedSite(f"{self.path}: attention reads something else than its norm makes of whole frames")
        if any(isinstance(each, Tensor | tuple | list) for each in (*args, *kwargs.values())):
            raise UnsupportedSite(f"{self.path}: attention is given masks or positions, which places have none of")
        count = clips(y, self.frames, None)

        def attend(sequences: Tensor) -> Tensor:
            output = call(sequences, *args, **kwargs)
            attended: Tensor = output[0] if isinstance(output, tuple) else output
            return attended

        by_place = y.unflatten(0, (count, self.frames)).transpose(1, 2)  # [clips, tokens, frames, d]
        added = self.across(attend, by_place.flatten(0, 1)).view_as(by_place)
        added = self.drop(added.transpose(1, 2).flatten(0, 1))
        norm, x, _ = normed
        output = call(norm(x + added), *args, **kwargs)
        self.behind.put((True,))
        if self.joins is None:
            return on_first(output, lambda h: self.within(h) + added)
        self.joins.take()
        self.joins.put((added,))
        return on_first(output, self.within)

    def _at_end(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.joins is not None, "it stands there for that"
        output, joining = call(*args, **kwargs), self.joins.take()
        return output if joining is None else on_first(output, lambda h: h + joining[0])


def attention_of(surgeon: Surgeon, block: PromptSite) -> tuple[PlaceSite, tuple[Site, ...]]:
    """Return the attention of a block as a site, and the further sites of its operator.

    Raises:
        UnsupportedSite: the block lacks an attention or has several, or has norms behind its branches.
    """
    resolver, path = surgeon.resolver, block.module_path
    inside = [entry for entry in resolver.host.entries if entry.block == path]
    found = [entry.path for entry in inside if entry.role == "attn"]
    if len(found) != 1 or any(entry.role.startswith("cross") for entry in inside) or is_post_norm(resolver, path):
        raise UnsupportedSite(f"{path} is no norm with one attention behind it; exclude= this block")
    whole = resolver.module_site(found[0])
    site = PlaceSite(**{**vars(whole), "form": "activation"}, width=block.width)
    norms = [e.path for e in inside if e.role == "norm" and e.kind == "norm" and not e.path.startswith(f"{found[0]}.")]
    ends = [e for e in branch_end(surgeon, whole).places if not e.module_path.startswith(f"{found[0]}.")]
    return site, (*(replace(resolver.site(each, "weight"), form=NORM) for each in norms), *ends)


def feed_forward_of(surgeon: Surgeon, block: PromptSite) -> Site:
    """Return the last matrix of a block's feed-forward.

    Raises:
        UnsupportedSite: the block lacks a feed-forward or has several.
    """
    inside = [entry for entry in surgeon.resolver.host.entries if entry.block == block.module_path]
    last = [entry for entry in inside if entry.role == "mlp.down"]
    if len(last) != 1:
        raise UnsupportedSite(f"{block.path} has no feed-forward, or several; exclude= this block")
    return surgeon.resolver.site(last[0].module, "weight", "mlp.down")


class FramesOperator(Operator):
    """Acts on the tokens in front of all blocks; at the convolution that embeds the patches (form "patch") it sees how
    many pictures there are."""

    changes_inputs = True

    def __init__(self, site: PlaceSite, frames: int) -> None:
        super().__init__(site)
        self.frames, self.pictures = frames, Tap(until_backward=True)

    def embedded(self, x: Tensor) -> Tensor:
        """Return the tokens ``[clips, frames, tokens, d]`` as the blocks get them."""
        raise NotImplementedError

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._at_patches if form == PATCH else self

    def _at_patches(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        patches = call(*args, **kwargs)
        self.pictures.put((len(patches),))
        return patches

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        (pictures,) = self.pictures.get() or (None,)
        count = clips(x, self.frames, pictures)
        return call(self.embedded(x.unflatten(0, (count, self.frames))).flatten(0, 1), *args, **kwargs)


def entrance(surgeon: Surgeon, block: PromptSite) -> tuple[PlaceSite, tuple[Site, ...]]:
    """Return where the embedded tokens of a block's tower go first, the norm behind the embeddings or the first block;
    and the convolution that embeds patches of pictures.

    Raises:
        UnsupportedSite: the tower lacks a convolution that embeds single pictures; those of videos embed several frames
            at once.
    """
    host, patches = surgeon.resolver.host, patch_sites(surgeon, block)
    if not patches:
        raise UnsupportedSite(f"{block.path}: no convolution in this tower embeds patches of single pictures")
    tower = host.at(block.module_path)[0].tower
    norms = [e.path for e in host.entries if e.role == "norm.embed" and e.tower == tower and e.kind == "norm"]
    first = host.select("block", tower)[0][0].path
    site = surgeon.resolver.module_site(norms[-1] if norms else first)
    return PlaceSite(**{**vars(site), "form": "activation"}, width=block.width, embeds=True), tuple(patches)


def norms_behind(surgeon: Surgeon, block: PromptSite) -> list[str]:
    """Return the paths of the norms behind the last block of a block's tower."""
    host = surgeon.resolver.host
    tower = host.at(block.module_path)[0].tower
    return [entry.path for entry in host.entries if entry.role == "norm.final" and entry.tower == tower]


class TimesOperator(FramesOperator):
    """Trained positions of frames, which start at zero."""

    def __init__(self, site: PlaceSite, frames: int) -> None:
        super().__init__(site, frames)
        self.times = nn.Parameter(torch.zeros(frames, site.width))

    def embedded(self, x: Tensor) -> Tensor:
        return x + self.cast(x, self.times)[0][:, None]
