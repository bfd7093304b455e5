"""Adapters on the residual stream: in front of a block, between its attention and its feed-forward, and after the
block.

Between attention and feed-forward no module returns the stream. In pre-norm blocks the norm reads x and the residual
connection skips the norm: ``y = x + MLP(LN(x))``. To add a term a, the operator passes x + a to the norm, and adds a to
the block's output: ``(x + a) + MLP(LN(x + a))``. In post-norm blocks the norm after the sum returns the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from peftcore.author import BlockSite, MethodConfig, Operator, Site, Surgeon, Tap, block_sites, on_first
from peftcore.errors import UnsupportedSite
from peftcore_vision._patches import patch_sites

READER, NORM, PATCH = "reader", "norm", "patch"
"""The forms of three sites. `READER`: the module that reads the residual stream between attention and feed-forward.
`NORM`: the norm that returns this stream. `PATCH`: the convolution that embeds patches."""


@dataclass(frozen=True)
class Stream:
    """Further sites and shared state of the operator that adds to one block's residual stream."""

    places: tuple[Site, ...]
    """Further sites of the block's operator."""
    carries: bool
    """True if the term that is added between attention and feed-forward is added again after the block."""
    lie: Tap
    """Stores the numbers of images, rows and columns of the patches in the output of the patch convolution."""


class StreamConfig(MethodConfig):
    """Options of adapters that convolve the residual stream."""

    grid: tuple[PositiveInt, PositiveInt] | None = None
    """Rows and columns of the patches; only their ratio counts. The default is the ratio in the output of the patch
    convolution, or a square if that convolution did not run."""
    prefix_tokens: NonNegativeInt | None = None
    """Number of tokens in front of the patches, such as a class token. By default, all tokens that do not fit into the
    largest grid."""

    @property
    def amid(self) -> bool:
        """True if an adapter acts between attention and feed-forward."""
        raise NotImplementedError


class StreamOperator(Operator):
    """Adds terms to the residual stream of one block. Features must be the last dimension of the stream.

    Raises:
        UnsupportedSite: the block does not call the module in front of its feed-forward.
    """

    changes_inputs = True

    def __init__(self, site: BlockSite, config: StreamConfig, stream: Stream) -> None:
        super().__init__(site)
        self.carries, self.lie = stream.carries, stream.lie
        self.grid, self.prefix_tokens = config.grid, config.prefix_tokens
        self.carried = Tap()

    def ahead(self, x: Tensor) -> Tensor | None:
        """Return the term to add in front of the block, or None."""
        return None

    def amid(self, x: Tensor) -> Tensor:
        """Return the term to add between attention and feed-forward."""
        raise NotImplementedError

    def behind(self, x: Tensor) -> Tensor | None:
        """Return the term to add after the block, or None."""
        return None

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return {READER: self._at_reader, NORM: self._at_norm, PATCH: self._at_patches}.get(form, self)

    def _at_patches(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        patches = call(*args, **kwargs)  # [batch, features, rows, columns]
        self.lie.put((patches.shape[0], patches.shape[-2], patches.shape[-1]))
        return patches

    def _at_reader(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        added = self.amid(x)
        self.carried.take()
        self.carried.put(added)
        return call(x + added, *args, **kwargs)

    def _at_norm(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        return y + self.amid(y)

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        added = self.ahead(x)
        return on_first(call(x if added is None else x + added, *args, **kwargs), self._behind)

    def _behind(self, y: Tensor) -> Tensor:
        if self.carries:
            carried = self.carried.take()
            if carried is None:
                raise UnsupportedSite(
                    f"{type(self).__name__}: the block did not call the module in front of its feed-forward; exclude "
                    "this block"
                )
            y = y + carried.reshape(y.shape)  # Swin puts rows and columns into one dimension there
        added = self.behind(y)
        return y if added is None else y + added


def streams(surgeon: Surgeon, config: StreamConfig) -> list[tuple[BlockSite, Stream]]:
    """Return the blocks among the targets, each with the sites and state that its operator needs to add to the residual
    stream.

    Raises:
        UnsupportedSite: the grid of patches is unknown. Also if an adapter acts between attention and feed-forward, but
            the block is not one attention followed by one feed-forward, or no module is known that reads the stream
            between them.
    """
    lies: dict[str, Tap] = {}
    found: list[tuple[BlockSite, Stream]] = []
    for site in block_sites(surgeon):
        own, patches = config.at(site.path), patch_sites(surgeon, site)
        if not patches and own.grid is None:
            raise UnsupportedSite(
                f"{site.path}: no convolution in this tower embeds patches of a picture, so its tokens have no grid; "
                "target a tower of images, or set grid="
            )
        places = (_amid(surgeon, site),) if own.amid else ()
        tower = patches[0].path if patches else ""
        seen = () if tower in lies else tuple(patches)
        lie = lies.setdefault(tower, Tap(until_backward=True))
        found.append((site, Stream((*places, *seen), any(place.form == READER for place in places), lie)))
    return found


def _amid(surgeon: Surgeon, block: BlockSite) -> Site:
    resolver, path = surgeon.resolver, block.module_path
    inside = [entry for entry in resolver.host.entries if entry.block == path]
    branches = {
        role: [each for each in inside if each.role == role] for role in ("attn.out", "attn", "cross", "mlp.down")
    }
    ending = branches["attn.out"] or branches["attn"]
    if branches["cross"] or len(branches["attn"]) > 1 or len(ending) != 1 or len(branches["mlp.down"]) != 1:
        raise UnsupportedSite(f"{path} is not an attention followed by a feed-forward; exclude this block")
    end = resolver.end_of(ending[0].module)
    if end is None or end.reader is None:
        raise UnsupportedSite(
            f"{path}: the module that reads the stream after the attention is unknown; exclude this block"
        )
    form = NORM if end.entered == end.reader else READER
    return replace(resolver.site(end.reader, "weight"), form=form)
