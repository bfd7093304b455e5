"""The blocks of a model as sites, with their paths, their numbers in a stack, and the widths of their hidden states."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import UnsupportedSite
from peftcore.forward.sequence.sequence_inside import WIDTHS
from peftcore.roles.block_calls import alike
from peftcore.roles.hostmap import under
from peftcore.targets.sites import Site

MIXERS = ("attn", "attn_mlp", "cross", "ssm")
"""Families of roles of modules that mix tokens. A block that contains no such module does not process a sequence."""


@dataclass(frozen=True, eq=False)
class BlockSite(Site):
    """A whole block as a site."""

    width: int = 0
    """The number of features of the block's hidden states."""
    depth: int = 0
    """The number of the block in its stack, from 0 on."""
    stack: str = ""
    """The path of the block with every number replaced by `*`. It is the same for all blocks of one stack."""
    blocks: int = 0
    """The number of blocks in its stack."""

    @property
    def weight_shape(self) -> torch.Size:
        """The width as a shape with one dimension. Plans and files show it as the shape of the site."""
        return torch.Size([self.width])


def stack_path(path: str) -> str:
    """Returns the path of a module with every number replaced by `*`. It is the same for all blocks of one stack."""
    return alike(path)


def block_depths(surgeon: Surgeon) -> dict[str | None, int]:
    """Returns the number of each block in its stack, by the path of the block. All stages of a model with several
    stages, such as Swin, count as one stack."""
    counts: Counter[str] = Counter()
    numbers: dict[str | None, int] = {}
    for entry in surgeon.resolver.host.entries:
        if entry.block is not None and entry.block not in numbers:
            stack = stack_path(entry.block)
            numbers[entry.block] = counts[stack]
            counts[stack] += 1
    return numbers


def block_sites(surgeon: Surgeon, *, each_run: bool = False) -> list[BlockSite]:
    """Returns the blocks that the user's target selects, or else those of the method's default target.

    Args:
        surgeon: the argument `surgeon` of `Method.inject`.
        each_run: True if the method treats each run of a block separately. Then the host may run one block several
            times in a forward.

    Raises:
        UnsupportedSite: a target is not a block, or its input is not a sequence of features with the batch first. Or
            the host runs a block several times in a forward, and `each_run` is False.
    """
    numbers = block_depths(surgeon)
    sites = [_block_site(surgeon, site, numbers, each_run) for site in surgeon.sites()]
    for site in sites:
        for other in sites:
            if site.width != other.width and site.path.rpartition(".")[0] == other.path.rpartition(".")[0]:
                raise UnsupportedSite(
                    f"{site.path} has {site.width} features, but {other.path} has {other.width}: target blocks of one "
                    "width"
                )
    return sites


def with_blocks(surgeon: Surgeon, *, each_run: bool = False) -> list[Site]:
    """Returns the sites that the user's target selects, or else those of the method's default target. Whole blocks
    among them are returned as `BlockSite`s.

    For methods that can act on the output of a matrix and on the output of a block.

    Raises:
        UnsupportedSite: a target is a block that `block_sites` does not accept.
    """
    numbers, sites = block_depths(surgeon), surgeon.sites()
    whole = [site.module_path in numbers and site.missing(site.tensor) for site in sites]
    pairs = zip(sites, whole, strict=True)
    return [_block_site(surgeon, site, numbers, each_run) if is_one else site for site, is_one in pairs]


def block_around(surgeon: Surgeon, site: Site, *, each_run: bool = False) -> BlockSite:
    """Returns the block that a site is in; `each_run` as in `block_sites`.

    Raises:
        UnsupportedSite: the site is not in a block, or in a block that `block_sites` does not accept.
    """
    numbers, path = block_depths(surgeon), site.module_path
    around = [block for block in numbers if block is not None and under(path, block)]
    if not around:
        raise UnsupportedSite(f"{path or 'the host'} is not in a block of this host; exclude it")
    block = surgeon.resolver.site(max(around, key=len), "weight", "block")
    return _block_site(surgeon, block, numbers, each_run)


def _block_site(surgeon: Surgeon, site: Site, numbers: dict[str | None, int], each_run: bool) -> BlockSite:
    path = site.module_path
    if path not in numbers:
        raise UnsupportedSite(f"{site.path or 'the host'} is not a block of this host; use target='block'")
    inside = [entry for entry in surgeon.resolver.host.entries if entry.block == path]
    if not any(entry.role.partition(".")[0] in MIXERS for entry in inside):
        raise UnsupportedSite(f"{path} does not process a sequence, since no module in it mixes tokens; exclude it")
    if surgeon.resolver.host.on_grid(path):
        raise UnsupportedSite(f"{path} processes a grid with convolutions instead of a sequence; exclude it")
    if any(entry.stream == "context" for entry in inside):
        raise UnsupportedSite(f"{path} returns two streams, and it is ambiguous which of them is meant; exclude it")
    site.check_rows_first()
    once = not each_run and not surgeon.resolver.check_runs_once(path)
    stack = stack_path(path)
    blocks = sum(stack_path(other or "") == stack for other in numbers)
    known = {**vars(site), "form": "activation", "once": once}
    return BlockSite(**known, width=block_width(surgeon, path), depth=numbers[path], stack=stack, blocks=blocks)


def block_width(surgeon: Surgeon, path: str) -> int:
    """Returns the number of features of a block's hidden states.

    Raises:
        UnsupportedSite: the number cannot be determined from the modules in the block.
    """
    for role in WIDTHS:
        for entry in surgeon.resolver.host.entries:
            if entry.block == path and entry.role == role and entry.stream == "main":
                return surgeon.resolver.site(entry.module, entry.tensor or "weight", role).out_features
    raise UnsupportedSite(f"{path}: its modules do not determine the width of its hidden states; exclude it")


def stream_width(surgeon: Surgeon, stack: Site) -> int:
    """Returns the number of features of the hidden states that a stack (a module that embeds tokens and runs blocks)
    returns.

    Raises:
        UnsupportedSite: the blocks and the embedding table have different widths, so the width of the output is
            ambiguous.
    """
    width, top = stack.out_features, stack.module_path
    for entry in surgeon.resolver.host.entries:
        if entry.role in WIDTHS and entry.stream == "main" and entry.block is not None and under(entry.block, top):
            inside = surgeon.resolver.site(entry.module, entry.tensor or "weight", entry.role).out_features
            if inside != width:
                raise UnsupportedSite(
                    f"{top or 'the host'} embeds tokens in {width} features, but its blocks have {inside}, so the "
                    "width of the states that it returns is ambiguous; use a model with one width"
                )
    return width
