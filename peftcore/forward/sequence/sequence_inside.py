"""Rows of a soft prompt that are computed inside a stack of blocks: at one block, or again at several blocks.

The rows are in the sequence from the first block on (see `peftcore.forward.sequence.sequence`), so masks, positions and
all layers of a cache have the same columns. Before the first block that computes rows, they are zeros, and the
attention there hides their columns from the tokens. So the tokens have the same values as without the rows. A block
that computes rows receives the new rows in place of the zeros. Positions that are added to embeddings count only the
tokens. Relative positions (rotary angles, biases by distance) continue after the rows. If the first block computes the
rows, they may be counted like tokens. Then all positions continue after them.

The blocks before the first one that computes rows may mix tokens only by attention that can hide columns, and the core
must know how the stack makes positions. For other hosts, applying the method raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import PluginError, SequenceError, UnsupportedSite
from peftcore.forward.attention.attention import Attend, AttentionOperator
from peftcore.forward.attention.attention_calls import locate_attention
from peftcore.forward.context.context import forward_context
from peftcore.forward.context.taps import Tap
from peftcore.forward.sequence.sequence import (
    MASK,
    NEST,
    POSITIONS,
    Nest,
    SequenceOperator,
    refuse_packing,
)
from peftcore.forward.sequence.sequence_cache import SequenceCacheView
from peftcore.forward.sequence.sequence_masks import KINDS
from peftcore.forward.sequence.sequence_order import Order
from peftcore.layers.layer import Layer, plain_class
from peftcore.roles import vocabulary as V
from peftcore.roles.entries import HostEntry
from peftcore.roles.stacks import CACHES, EMBEDS, IDS, arguments
from peftcore.targets.attention_sites import AttentionSite
from peftcore.targets.resolver import Resolver
from peftcore.targets.sequence_sites import FORM, SequenceSite
from peftcore.targets.sites import Site

WIDTHS = ("mlp.down", "experts.down", "attn.out", "attn_mlp.out", "ssm.out")
"""Roles of the matrices whose outputs are added to a block's residual stream; their number of outputs is its width."""
BLOCK = f"{FORM}.block."
"""The prefix of the `form` of a site at a block that computes rows. The number of the block follows it."""


@dataclass(frozen=True, eq=False)
class InnerSite(SequenceSite):
    """A stack in which some blocks compute the rows of a soft prompt."""

    depths: tuple[int, ...] = ()
    """The numbers of the blocks that compute rows, in order."""
    hiding: tuple[tuple[AttentionSite, int], ...] = ()
    """The attention sites before the first block that computes rows, with the numbers of their blocks."""
    absolute: bool = False
    """Whether positions are added to the embeddings from a table. Then they count only the tokens."""


def count_blocks(site: SequenceSite, resolver: Resolver) -> int:
    """Returns the number of blocks in a stack (a module that embeds token ids and runs the blocks)."""
    return len(_blocks(site, resolver))


def inside(site: SequenceSite, resolver: Resolver, depths: Sequence[int], counted: bool = False) -> InnerSite:
    """Returns the site for a stack of blocks in which the blocks with the given numbers compute rows. With `counted`,
    the positions of the tokens continue after the soft-prompt rows.

    Raises:
        UnsupportedSite: a block does not exist, receives tokens as the first dimension, or runs several times in a
            forward; or a module before them mixes tokens and cannot hide the rows; or it is not known how the stack
            makes positions.
        PluginError: `counted` is set, but the first of the blocks is not block 0.
    """
    name, stack, blocks = site.module_path or "the host", site.stack, _blocks(site, resolver)
    chosen = tuple(sorted(set(depths)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(blocks):
        raise UnsupportedSite(
            f"{name} has blocks 0 to {len(blocks) - 1}, but rows should be made at blocks {list(depths)}: use numbers "
            "of existing blocks"
        )
    if counted and chosen[0]:
        raise PluginError(
            f"rows made at block {chosen[0]} cannot count as positions, because earlier blocks run without them: pass "
            "counted=False, or make the rows at block 0"
        )
    if stack.entry != stack.path:
        raise UnsupportedSite(
            f"{name} takes embeddings only in {stack.entry}, so its masks and positions cannot follow rows that are "
            "added after it: use rows in front of the whole stack"
        )
    _check_width(site, resolver, blocks)
    for path in (blocks[depth] for depth in chosen):
        resolver.site(path, "weight", "block").check_rows_first()
        resolver.check_runs_once(path)
    below = {path: depth for depth, path in enumerate(blocks[: chosen[0]])}
    _check_kinds(site, chosen[0])
    hiding = [(locate_attention(replace(each, meta=site.meta), resolver), depth) for each, depth in
              _attentions(site, resolver, below)]  # fmt: skip
    places = [Site(resolver.modules[blocks[depth]], blocks[depth], "", Layer(), form=f"{BLOCK}{depth}", meta=site.meta)
              for depth in chosen]  # fmt: skip
    known = {**vars(site), "places": (*site.places, *places)}
    known.pop("_path", None)
    absolute = not counted and _adds_positions(site, resolver, blocks)
    return InnerSite(**known, depths=chosen, hiding=tuple(hiding), absolute=absolute)


def _blocks(site: SequenceSite, resolver: Resolver) -> list[str]:
    """Returns the paths of a stack's blocks in their order."""
    return [entry.path for entry in resolver.host.entries if entry.role == "block" and _within(entry.path, site)]


def _check_width(site: SequenceSite, resolver: Resolver, blocks: Sequence[str]) -> None:
    """Check that the blocks have the width of the token embeddings."""
    found = (
        entry for role in WIDTHS for entry in resolver.host.entries if (entry.role, entry.block) == (role, blocks[0])
    )
    last = next(found, None)
    if last is None:
        return
    wide = resolver.site(last.module, last.tensor or "weight", last.role).out_features
    if wide != site.out_features:
        raise UnsupportedSite(
            f"{site.module_path or 'the host'} has embeddings of width {site.out_features} but blocks of width {wide}, "
            "so rows made at blocks would need another width: use rows in front of the whole stack"
        )


def _within(path: str, site: SequenceSite) -> bool:
    return not site.module_path or path.startswith(f"{site.module_path}.")


def _attentions(site: SequenceSite, resolver: Resolver, below: Mapping[str, int]) -> list[tuple[Site, int]]:
    """Returns the attention sites of the blocks in `below`, with the block numbers. Raises UnsupportedSite if another
    module there mixes tokens."""
    found = []
    for entry in resolver.host.entries:
        if entry.block in below and (entry.role.partition(".")[0] == "ssm" or resolver.host.on_grid(entry.module)):
            raise UnsupportedSite(
                f"{entry.path} reads all earlier positions, and cannot skip rows that tokens must not see yet: make "
                "the rows at block 0"
            )
    for core in resolver.sites("attn.core") if below else ():
        path = next((block for block in below if f"{core.module_path}.".startswith(f"{block}.")), None)
        if path is not None:
            found.append((core, below[path]))
    if missing := set(below.values()) - {depth for _, depth in found}:
        raise UnsupportedSite(
            f"{site.module_path or 'the host'}: block {min(missing)} has no known attention that could hide the rows "
            "from the tokens: make them at block 0"
        )
    return found


def _check_kinds(site: SequenceSite, first: int) -> None:
    """Check that attention in the blocks before `first` does not depend on the position at which the sequence
    begins."""
    config = vars(site.module).get("config")
    kinds = getattr(config.get_text_config(), "layer_types", None) if config is not None and first else None
    other = [kind for kind in (kinds or ())[:first] if kind not in KINDS]
    if other:
        raise UnsupportedSite(
            f"{site.module_path or 'the host'} has {other[0]} below block {first}, where added rows would change which "
            "tokens see each other: make the rows at block 0"
        )


def _adds_positions(site: SequenceSite, resolver: Resolver, blocks: Sequence[str]) -> bool:
    """Whether the stack of blocks adds positions to embeddings. Raises UnsupportedSite if it does so without a
    `position_ids` argument, or in an unknown way."""
    name = site.module_path or "the host"
    tops = tuple(f"{block}." for block in blocks)
    tables = [entry for entry in resolver.host.entries if entry.role == "embed.pos" and _within(entry.path, site)]
    outside = [entry for entry in tables if not entry.path.startswith(tops)]
    takes = POSITIONS in arguments(plain_class(site.module))
    if any(not _is_table(resolver, entry) for entry in outside) or (outside and not takes):
        raise UnsupportedSite(
            f"{outside[0].path} computes positions itself, so added rows would shift the positions of the tokens after "
            "them: use rows in front of the whole stack"
        )
    known = {entry.path for entry in tables}
    for path, module in resolver.modules.items():
        outer = path != site.module_path and _within(path, site) and not path.startswith(tops) and path not in known
        if outer and V.words(path.rpartition(".")[2]) & V.POSITION and not any(True for _ in module.parameters()):
            raise UnsupportedSite(f"{path} computes positions in an unknown way: use rows in front of {name}")
    if not tables and not takes and blocks:
        raise UnsupportedSite(
            f"{name} has neither a position_ids argument nor a position table, so the positions of its tokens are not "
            "known: use rows in front of the whole stack"
        )
    return bool(outside)


def _is_table(resolver: Resolver, entry: HostEntry) -> bool:
    module = resolver.modules.get(entry.path)
    return module is not None and plain_class(module) is nn.Embedding


@dataclass(frozen=True, eq=False)
class Standing:
    """The positions of one edit's rows (the rows of one soft prompt) in one forward of a stack of blocks."""

    nest: Nest
    stamp: str
    enter: bool
    """Whether this forward inserts the soft-prompt rows; otherwise the cache contains them."""

    def hidden(self, depth: int) -> Tensor:
        """Returns the mask ``[batch or 1, 1, queries, keys]`` for the attention of a block, True where a key is hidden.
        Tokens do not see the soft-prompt rows, but the rows see each other."""
        keys = self.nest.rows_among(self.stamp, self.nest.keys[depth])
        others = ~self.nest.rows_among(self.stamp, self.nest.asking)
        return keys[:, None, None, :] & others[:, None, :, None]

    def remade(self, states: Tensor, make: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Returns the input of a block, ``[batch, positions, width]``, with the edit's rows replaced by the output of
        `make(tokens, rows)`. Its arguments are the user's tokens and the current rows."""
        outside, order, inside = self.nest.split(self.stamp)
        nearer = []
        for each in inside:
            nearer.append(each.rows(states))
            states = each.dropped(states)
        rest = order.dropped(states)
        tokens = rest
        for each in outside:
            tokens = each.dropped(tokens)
        states = order.put(torch.cat([make(tokens, order.rows(states)), rest], dim=1))
        for each, rows in zip(reversed(inside), reversed(nearer), strict=True):
            states = each.put(torch.cat([rows, states], dim=1))
        return states

    def tokens(self, states: Tensor) -> Tensor:
        """Returns only the user's tokens from the input of a block."""
        if self.enter:
            for each in reversed(self.nest.edits.values()):
                states = each.dropped(states)
        return states


class InnerRows(SequenceOperator):
    """Base class of operators whose soft-prompt rows are computed at inner blocks of a model. Subclasses define
    `rows_at`."""

    def __init__(self, site: SequenceSite, length: int) -> None:
        if not isinstance(site, InnerSite):
            raise PluginError(
                f"{type(self).__name__} needs the blocks at which its rows are made: surgeon.sequence(..., "
                "blocks=[...])"
            )
        super().__init__(site, length)
        self.depths, self.absolute = site.depths, site.absolute
        self.hides = tuple(depth for _, depth in site.hiding)
        self.standing = Tap(until_backward=True)

    def rows_at(self, depth: int, states: Tensor, rows: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Returns the soft-prompt rows that the block with number `depth` receives: ``[length, width]``, or ``[batch,
        length, width]``.

        Args:
            depth: the number of the block.
            states: the user's tokens before the block, ``[batch, tokens, width]``.
            rows: the rows before the block, ``[batch, length, width]``. At the first block that computes rows, they are
                the output of the earlier blocks for rows of zeros.
            given: the user's mask and cache by name.
        """
        raise NotImplementedError

    def going_on(self, depth: int, states: Tensor, given: Mapping[str, Any]) -> None:
        """Called instead of `rows_at` if a cache already contains the soft-prompt rows. `states` are the new tokens
        before the block. Override it if the rows would depend on these tokens."""

    def rows(self, embeds: Tensor) -> Tensor:
        """Returns zeros, the values of the soft-prompt rows before the first block that computes rows."""
        return embeds.new_zeros(self.length, embeds.shape[-1])

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        if form.startswith(BLOCK):
            return partial(self._run_block, int(form.removeprefix(BLOCK)), self.names[form][0])
        return super().at(form, module)

    def _around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer = NEST.get()
        if outer is None or outer.path != self.stack.path:
            given = self._bind(FORM, args, kwargs)
            told = {name: value for name, value in given.items() if name == MASK or name in CACHES}
            NEST.put(Nest(self.stack.path, told, set()))
        try:
            return super()._around(module, call, *args, **kwargs)
        finally:
            NEST.take()
            if outer is not None:
                NEST.put(outer)

    def _begin(self, given: dict[str, Any], order: Order, cache: SequenceCacheView) -> None:
        nest: Nest = NEST.get()
        nest.depths.update(self.hides)
        super()._begin(given, order, cache)
        self.standing.put(Standing(nest, self.stamp, not cache.held))
        like = given[IDS] if given.get(EMBEDS) is None else given[EMBEDS]
        if self.absolute:
            self._say_positions(given, like, cache)

    def _say_positions(self, given: dict[str, Any], like: Tensor, cache: SequenceCacheView) -> None:
        """Set the positions of the tokens if the user passes none, because the stack of blocks would count the
        soft-prompt rows too."""
        if (told := given.get(POSITIONS)) is not None and not cache.held:
            refuse_packing(told if told.dim() > 1 else told[None], given)
        if given.get(MASK) is None and not cache.held:
            given[MASK] = torch.ones(like.shape[:2], dtype=torch.long, device=like.device)  # none of it is packed
        if told is not None:
            return
        ids, padding = given.get(IDS), self.stack.position_padding
        past = cache.past - self.length if cache.held else 0
        if padding is not None and ids is not None and given.get(EMBEDS) is None:
            given[POSITIONS] = ((ids != padding).cumsum(1) + past) * (ids != padding) + padding
            return
        first = past if padding is None else past + padding + 1
        given[POSITIONS] = torch.arange(like.shape[1], device=like.device)[None] + first

    def _shifted(self, given: Mapping[str, Any], order: Order, enter: bool) -> dict[str, Any]:
        if not self.absolute:
            return super()._shifted(given, order, enter)
        changed = super()._shifted({**given, POSITIONS: None}, order, enter)
        places = given[POSITIONS] if given[POSITIONS].dim() > 1 else given[POSITIONS][None]
        if enter:
            first = order.first(places)
            both = [first.expand(*first.shape[:-1], self.length), places.expand(*first.shape[:-1], -1)]
            places = order.put(torch.cat(both, dim=-1), dim=-1, batch=-2)
        changed[POSITIONS] = places
        return changed

    def _run_block(self, depth: int, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block that computes rows."""
        standing: Standing | None = self.standing.get()
        if standing is None:  # it runs by itself
            return call(*args, **kwargs)
        states = args[0] if args else kwargs[name]
        if not standing.enter:
            self.going_on(depth, standing.tokens(states), standing.nest.given)
            return call(*args, **kwargs)
        if (self.stamp, depth) in standing.nest.made and not forward_context().repeating:
            raise SequenceError(
                f"block {depth} runs several times in one forward, so it is unclear in which run to make rows: use "
                "rows in front of the whole stack"
            )
        standing.nest.made.add((self.stamp, depth))
        states = standing.remade(states, lambda tokens, rows: self._made(depth, tokens, rows, standing.nest.given))
        return call(states, *args[1:], **kwargs) if args else call(**{**kwargs, name: states})

    def _made(self, depth: int, tokens: Tensor, rows: Tensor, given: Mapping[str, Any]) -> Tensor:
        made = self.rows_at(depth, tokens, rows, given)
        self.check_here(made, tokens)
        if made.shape[-2:] != rows.shape[-2:]:
            raise PluginError(
                f"{type(self).__name__}.rows_at returned a tensor of shape {tuple(made.shape)}: return {self.length} "
                f"rows as wide as the block's input, {rows.shape[-1]}"
            )
        (made,) = self.cast(tokens, made)
        return made.expand(len(tokens), -1, -1)


class Unseen(AttentionOperator):
    """Hides the soft-prompt rows from the tokens, in one attention before the first block that computes rows."""

    def __init__(self, site: AttentionSite, depth: int, standing: Tap) -> None:
        super().__init__(site)
        self.depth, self.standing = depth, standing

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        standing: Standing | None = self.standing.get()
        if standing is None:
            return attend(query, key, value)
        return attend.hiding(standing.hidden(self.depth).to(query.device), query, key, value)
