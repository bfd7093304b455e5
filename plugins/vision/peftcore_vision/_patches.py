"""Finds the convolutions that embed patches of pictures, and determines how patches are arranged in a sequence of
tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from peftcore.author import Site, Surgeon
from peftcore.errors import UnsupportedSite


def patch_sites(surgeon: Surgeon, site: Site) -> list[Site]:
    """Return the patch convolutions of the encoder (tower) that contains a site, as sites of the form "patch"."""
    host = surgeon.resolver.host
    tower = next((entry.tower for entry in host.at(site.module_path)), "")
    patches = (e for e in host.entries if e.role == "patch" and e.tower == tower and e.called and len(e.shape) == 4)
    return [replace(surgeon.resolver.site(entry.module, "weight"), form="patch") for entry in patches]


def picture_sites(surgeon: Surgeon) -> list[Site]:
    """Return the convolutions that read pictures: the user's targets, or the first convolution of each encoder (tower).

    Raises:
        UnsupportedSite: the model lacks such a convolution, or a target is another kind of module.
    """
    firsts: dict[str, str] = {}
    for entry in surgeon.resolver.host.entries:
        if entry.role == "patch" and entry.block is None and entry.called and len(entry.shape) == 4:
            firsts.setdefault(entry.tower, entry.path)
    found = [surgeon.resolver.site(path, "weight", "patch") for path in firsts.values()]
    sites = surgeon.chosen(found) if found else []
    if not sites:
        raise UnsupportedSite(
            f"no target is a convolution of this {type(surgeon.model).__name__} that reads pictures; such convolutions "
            f"are: {', '.join(firsts.values()) or 'none'}"
        )
    return sites


def side_of(surgeon: Surgeon, site: Site) -> int | None:
    """Return the side, in pixels, of the square pictures for which the position embeddings of a convolution's encoder
    were made. Extra positions, such as that of a class token, are ignored. Return None if the encoder does not have
    exactly one table of positions."""
    host = surgeon.resolver.host
    tower = next((entry.tower for entry in host.at(site.module_path)), "")
    tables = [e for e in host.entries if e.role == "embed.pos" and e.tower == tower and e.block is None]
    rows = [math.prod(entry.shape[:-1]) for entry in tables if 2 <= len(entry.shape) <= 4]
    return math.isqrt(rows[0]) * site.kernel[0] if len(rows) == 1 else None


def layout(
    lie: tuple[int, int, int] | None,
    batch: int,
    tokens: int,
    grid: tuple[int, int] | None,
    prefix_tokens: int | None,
) -> tuple[int, int]:
    """Return the numbers of rows and columns of the patches in a sequence.

    Args:
        lie: the numbers of images, rows and columns that the patch convolution embedded; None if it did not run.
        batch: the number of sequences.
        tokens: the number of tokens of each sequence.
        grid: the proportion of rows to columns, if the user sets it.
        prefix_tokens: how many tokens in front are not patches; None: all tokens that do not fit into the largest grid.

    Raises:
        UnsupportedSite: the tokens after the first `prefix_tokens` do not form a grid.
    """
    images, high, wide = lie or (batch, 1, 1)
    if grid is not None:
        high, wide = grid
    elif images != batch:  # windows of them
        high, wide = 1, 1
    if prefix_tokens is None:
        rows = math.isqrt(tokens * high // wide)
        return rows, rows * wide // high
    patches = tokens - prefix_tokens
    rows = round(math.sqrt(max(patches, 0) * high / wide))
    if not rows or patches % rows:
        raise UnsupportedSite(
            f"{tokens} tokens with {prefix_tokens} in front do not form a grid of {high} by {wide}; set grid= and "
            "prefix_tokens= (overrides= for single sites)"
        )
    return rows, patches // rows


def over_patches(
    u: Tensor,
    act: Callable[[Tensor], Tensor],
    lie: tuple[int, int, int] | None,
    grid: tuple[int, int] | None,
    prefix_tokens: int | None,
) -> Tensor:
    """Return tokens to which a function of pictures ``[n, features, rows, columns]`` was applied. The patches are
    arranged as in the picture. Each token in front of the patches is passed as a picture of one pixel.

    Args:
        u: pictures ``[batch, ..., rows, columns, features]``, sequences ``[batch, tokens, features]``, or single tokens
            ``[batch, features]``.
        act: the function; its output has the same rows and columns.
        lie: as in `layout`.
        grid: as in `layout`.
        prefix_tokens: as in `layout`.

    Raises:
        UnsupportedSite: the tokens after the first `prefix_tokens` do not form a grid.
    """
    if u.dim() >= 4:  # and those of a video one by one
        return act(u.flatten(0, -4).movedim(-1, 1)).movedim(1, -1).reshape(*u.shape[:-1], -1)
    if u.dim() == 2:  # nothing around it
        return act(u[..., None, None]).flatten(1)
    rows, columns = layout(lie, u.shape[0], u.shape[1], grid, prefix_tokens)
    others = u.shape[1] - rows * columns
    parts = []
    if others:
        alone = act(u[:, :others].flatten(0, 1)[..., None, None])  # [batch * others, features, 1, 1]
        parts.append(alone.flatten(1).unflatten(0, (-1, others)))
    if rows * columns:
        patches = act(u[:, others:].unflatten(1, (rows, columns)).movedim(-1, 1))
        parts.append(patches.movedim(1, -1).flatten(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
