"""Edits: operators inside attention. They add keys and values to the softmax, add a second softmax, or change queries.
An edit wraps the function with which an attention module computes ``softmax(q k^T) v``. The module
`peftcore.forward.attention.attention_calls` makes attention modules call the edits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.contract.operators import _Base
from peftcore.errors import UnsupportedSite
from peftcore.forward.context.context import forward_context
from peftcore.forward.context.row_random_numbers import draws_of
from peftcore.forward.rows.routing import OwnRows, own_rows, put_together, rows_seen, select_rows
from peftcore.targets.attention_sites import AttentionSite, Geometry

if TYPE_CHECKING:
    from peftcore.forward.attention.attention_calls import AttentionCalls
    from peftcore.forward.state.slot import Edits
    from peftcore.forward.tensors.mount import Mount

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(query, key, value) -> output``, each ``[batch, heads, length, width]``."""


class AttentionOperator(_Base):
    """An operator inside an attention module, between its projections and the softmax.

    ``forward(attend, query, key, value)`` returns the output of the attention: ``[batch, heads, queries, value_dim]``.
    `query` is ``[batch, heads, queries, head_dim]``. `key` and `value` are ``[batch, kv_heads, keys, width]`` and
    include cached ones. `attend` computes the attention that this operator wraps; see `Attend`.
    """

    calls: AttentionCalls
    """How the module calls its attention function."""

    def __init__(self, site: AttentionSite) -> None:
        super().__init__(site)
        self.geometry = site.geometry
        self.projections = site.projections
        assert site.calls is not None, "operators are put at sites that were found"
        self.calls = site.calls
        self.calls.prepare()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.calls.prepare()  # a pickle may be loaded in a fresh process

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the output of the attention, computed with calls of `attend`: ``[batch, heads, queries,
        value_dim]``."""
        raise NotImplementedError

    def cast(self, like: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns `tensors` in the dtype of `like`, also under autocast, in which elementwise products would have a
        higher precision."""
        return tuple(tensor.to(like.dtype) for tensor in tensors)


class Attend:
    """The attention that an edit (an operator inside attention) wraps: the host's attention, or another edit around it.
    Edits call this object."""

    def __init__(self, host: HostAttention, inner: Compute, operator: AttentionOperator) -> None:
        self._host, self._inner, self._operator = host, inner, operator

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the output of the wrapped attention, with causality and padding: ``[batch, heads, queries,
        value_dim]``. If the edit (an operator inside attention) adds keys before the given keys, every query sees them.
        Shapes are those of `AttentionOperator`."""
        return self._inner(query, key, value)

    def hiding(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the output of the wrapped attention with some keys masked.

        Args:
            hidden: ``[batch or 1, 1, queries, keys]`` of bool, True where a query must not see one of the host's keys.
                They are the last of the given keys.
            query: as in `AttentionOperator`.
            key: as in `AttentionOperator`.
            value: as in `AttentionOperator`.
        """
        return self._host.hiding(hidden, query.dtype, lambda: self._inner(query, key, value))

    @property
    def keys(self) -> int:
        """The number of the host's keys, cached keys included. They are the last keys that the edit (an operator inside
        attention) receives."""
        return self._host.keys

    def among(self, start: int, stop: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the output of the attention on the tokens from `start` to `stop` only: ``[batch, heads, stop - start,
        value_dim]``. All keys before the host's keys are used too. Only for self-attention without cached keys, which
        has as many queries as `keys`."""
        front = key.shape[2] - self.keys
        key, value = (
            torch.cat([each[:, :, :front], each[:, :, front + start : front + stop]], dim=2) for each in (key, value)
        )
        return self._host.among(start, stop, lambda: self._inner(query[:, :, start:stop], key, value))

    def apart(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the output of a separate softmax over other keys: ``[batch, heads, queries, value_dim]``. `key` and
        `value` are ``[batch, kv_heads, any, width]``. Every query sees all of them, and the scale is the host's."""
        return self._host.apart(query, key, value)

    def project(self, part: str, states: Tensor) -> Tensor:
        """Returns `states` ``[length, in]``, projected by the frozen projection `part` ("q", "k" or "v") of the
        attention and split into heads: ``[heads of that part, length, width]``. Positional encodings are not
        applied."""
        with forward_context().aside():
            made = self._operator.projections[part].apply(self._host.module, states, base=self._host.routed)
        heads = self._operator.geometry.heads if part == "q" else self._operator.geometry.kv_heads
        return made.reshape(len(states), heads, -1).transpose(0, 1)


_PER_KEY = ("position_bias",)
"""Arguments of attention functions that have a column for each key."""


class HostAttention:
    """The host's own attention function in one forward, with the arguments of its call."""

    def __init__(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        causal: bool,
        key: Tensor,
        mask: Tensor | None,
        options: Mapping[str, Any],
        routed: bool,
    ) -> None:
        self.module, self._function, self._causal, self.routed = module, function, causal, routed
        self.keys, self._mask, self._options = key.shape[2], mask, options
        self.weights: Tensor | None = None

    @property
    def others(self) -> tuple[Tensor | None, Mapping[str, Any]]:
        """The arguments for which it is not certain that they have one row per row of the batch. Queries, keys, values
        and a four-dimensional mask certainly have it."""
        unsaid = None if self._mask is None or self._mask.dim() == 4 else self._mask
        return unsaid, self._options

    def of(self, rows: OwnRows) -> HostAttention:
        """Returns the same attention function with the mask and options of some rows of the batch."""
        own = copy.copy(self)
        own._mask, own._options = rows.of(self._mask), rows.of(dict(self._options))
        return own

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        front = key.shape[2] - self.keys
        options = dict(self._options)
        for name in _PER_KEY if front else ():
            if options.get(name) is not None:
                options[name] = F.pad(options[name], (front, 0))  # a new key stands at no distance from anything
        output, weights = self._function(self.module, query, key, value, self._padded(front, query), **options)
        self.weights = None if weights is None else weights[..., front:]
        transposed: Tensor = output.transpose(1, 2)
        return transposed

    def apart(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = {name: value for name, value in self._options.items() if name not in _PER_KEY}
        output, _ = self._function(self.module, query, key, value, None, **{**options, "is_causal": False})
        transposed: Tensor = output.transpose(1, 2)
        return transposed

    def among(self, start: int, stop: int, run: Callable[[], Tensor]) -> Tensor:
        """Returns the output of `run`, which calls this attention, restricted to the tokens from `start` to `stop`.
        Sets `weights` to None, since weights for all tokens are not computed."""
        outer = self.keys, self._mask, self._options
        cut = {name: _cut(self._options.get(name), start, stop) for name in _PER_KEY if name in self._options}
        self.keys, self._mask = stop - start, _cut(self._mask, start, stop)
        self._options = {**self._options, **cut}
        try:
            return run()
        finally:
            self.keys, self._mask, self._options = outer
            self.weights = None

    def hiding(self, hidden: Tensor, dtype: torch.dtype, run: Callable[[], Tensor]) -> Tensor:
        """Returns the output of `run`, which calls this attention, with the keys of `hidden` masked. `dtype` is the
        dtype of the queries."""
        outer = self._mask
        self._mask = self._without(hidden, dtype)
        try:
            return run()
        finally:
            self._mask = outer

    def _without(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the mask with the `hidden` keys masked too. Without a mask, returns an additive one, which every
        attention function accepts."""
        mask, queries = self._mask, hidden.shape[2]
        if mask is not None and mask.dtype == torch.bool:
            return mask & ~hidden
        if mask is None:
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            if queries > 1 and self._is_causal():
                hidden = hidden | _later(queries, hidden.shape[3], hidden.device)
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

    def _padded(self, front: int, query: Tensor) -> Tensor | None:
        """Returns the mask with a visible column for each of the `front` added keys. Without a mask, makes a causal one
        if the attention is causal."""
        mask, queries = self._mask, query.shape[2]
        if front == 0:
            return mask
        if mask is not None:  # boolean: True is visible; additive: 0 is visible
            return F.pad(mask, (front, 0), value=1.0 if mask.dtype == torch.bool else 0.0)
        if queries == 1 or not self._is_causal():
            return None
        causal = query.new_zeros(queries, self.keys)
        causal = causal.masked_fill(_later(queries, self.keys, query.device), torch.finfo(query.dtype).min)
        return F.pad(causal, (front, 0))[None, None]

    def _is_causal(self) -> bool:
        given = self._options.get("is_causal")
        return self._causal and bool(getattr(self.module, "is_causal", True) if given is None else given)


def _later(queries: int, keys: int, device: torch.device) -> Tensor:
    """Returns ``[queries, keys]`` of bool, True where a key is later than a query. Query 0 is aligned with key 0, as in
    torch's sdpa, because a static cache has space for keys that are not written yet."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)


def _cut(each: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Returns the part of a mask ``[..., queries or 1, keys]`` for the tokens from `start` to `stop`; None if the mask
    is None."""
    if each is None:
        return None
    return (each if each.shape[-2] == 1 else each[..., start:stop, :])[..., start:stop]


def _chain(mounts: Iterable[Mount], host: HostAttention) -> Compute:
    """Returns the host's attention wrapped by the edits (operators inside attention), the first edit innermost."""
    compute: Compute = host
    for mount in mounts:
        operator = mount.operator
        assert isinstance(operator, AttentionOperator)
        compute = functools.partial(operator, Attend(host, compute, operator))
    return compute


def run_edits(
    edits: Edits, host: HostAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Returns the output ``[batch, heads, queries, value_dim]`` of the host's attention with edits (operators inside
    attention), and the attention weights or None. With a route, each row gets only the edits of its injection.

    Raises:
        UnsupportedSite: the sizes of the tensors differ from those of the site.
    """
    if edits.slot.state.watches_runs:
        edits.slot.ran[host.module.training] = True
    first = edits.mounts[0].operator
    assert isinstance(first, AttentionOperator)
    _check_shapes(first.geometry, query, key, value)
    route = edits.route
    if route is None:
        return _chain(edits.mounts, host)(query, key, value), host.weights
    count = None if torch.compiler.is_compiling() else rows_seen(route, (query, host.others), {})
    if count is not None:
        edited = {mount.name for mount in edits.mounts}  # all others are one softmax, whatever acts on them elsewhere
        route = route.only(tuple(n for n, name in enumerate(route.names) if name in edited))
        parts = {}
        for position in route.present:
            rows = OwnRows(route, (position,), count)
            mounts = [mount for mount in edits.mounts if position >= 0 and mount.name == route.names[position]]
            own = host.of(rows)
            with own_rows(rows, f"{edits.slot.path}:attention"):
                output = _chain(mounts, own)(*rows.of((query, key, value)))
            parts[position,] = output, own.weights
        together: tuple[Tensor, Tensor | None] = put_together(parts, route)
        return together
    result = host(query, key, value), host.weights
    for position, name in enumerate(route.names):
        mounts = [mount for mount in edits.mounts if mount.name == name]
        if mounts:
            with draws_of(forward_context(), route, position, f"{edits.slot.path}:attention", alone=False):
                other = _chain(mounts, host)(query, key, value), host.weights
            result = select_rows(result, other, route, position)
    return result


def _check_shapes(geometry: Geometry, query: Tensor, key: Tensor, value: Tensor) -> None:
    ranks = {each.dim() for each in (query, key, value)}
    found = Geometry(query.shape[1], key.shape[1], key.shape[-1], value.shape[-1])
    if ranks != {4} or found != geometry:
        raise UnsupportedSite(
            f"this attention computes with {found}, but its modules have {geometry}: exclude it from the adapter's "
            "target modules"
        )
