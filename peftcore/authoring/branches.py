"""Adapters at the end of a branch of a block, or in parallel with the branch.

This module finds the start and the end of a branch, and passes the branch's input, or the input of the norm before it,
to the end."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

from torch import Tensor, nn

from peftcore.contract.operators import Operator, on_first
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import RouteError, UnsupportedSite
from peftcore.forward.context.taps import Tap
from peftcore.roles import HostEntry
from peftcore.roles.branch_ends import Order
from peftcore.roles.hostmap import under
from peftcore.targets.resolver import Resolver
from peftcore.targets.sites import Site

FIRST = {
    "mlp.down": {"mlp.gate_up", "mlp.gate", "mlp.up"},
    "attn.out": {"attn.qkv", "attn.q", "attn.q_a"},
    "cross.out": {"cross.qkv", "cross.q", "cross.q_a"},
    "attn_mlp.out": {"attn_mlp.in", "attn.qkv", "attn.q"},
}
"""Roles of the first matrices of a branch, which read its input, by the role of its last matrix."""
READ_STREAM = frozenset({"attn.k", "attn.v", "attn.kv"}).union(*FIRST.values())
"""Roles of the matrices that read the hidden states of a block (its stream)."""

Joins = Literal["stream", "matrix"]
"""The point at which an adapter joins a branch: after all modules that the host applies to the branch's output before
it adds it to the stream (dropout, layer scale, stochastic depth, a norm), or at the branch's last matrix, before these
modules.
"""
END, ENTERED = "end", "entered"
"""Forms of two sites: the module after which a branch is added to the stream, and the module whose input is the sum."""


@dataclass(frozen=True, eq=False)
class BranchSite(Site):
    """The last matrix of a branch, with the modules that read the branch's input and the module at which it ends.

    A module that does not end a branch is treated as a branch of one module."""

    width: int = 0
    """The number of features of the branch's input."""
    places: tuple[Site, ...] = ()
    """Further sites of the operator: modules that read the input (form "first"), the block's norms ("norm"), and the
    module after which the branch is added to the stream ("end") or whose input is the sum ("entered")."""
    order: Order | None = None
    """The order of dimensions of the branch's output, if it differs from the order in the output of the last matrix."""
    drops_path: bool = False
    """Whether the module at the end of the branch is stochastic depth."""


class AtBranchEnd(Operator):
    """Acts on the output of a branch: after the module that ends the branch, or at its last matrix if that module is
    unknown. `forward` notes the last matrix that ran, so that a module that ends several branches can be assigned to
    the current one.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        places, order = (site.places, site.order) if isinstance(site, BranchSite) else ((), None)
        self.passed = Tap() if any(place.form in (END, ENTERED) for place in places) else None
        self.order = order
        if self.passed is not None:
            self.observes = type(self).observes | {site.form}

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._at_end if form == END else self

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output, read = call(*args, **kwargs), self.read(*args)
        if self.passed is None:
            return on_first(output, lambda h: self.join(h, read, None))
        self.passed.take()
        self.passed.put((read,))
        return output

    def _at_end(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.passed is not None, "only places with this form call it"
        output = call(*args, **kwargs)
        passed = self.passed.take()  # not before: the branch may run in the call
        if passed is None:  # another branch ends here, too
            return output
        return on_first(output, lambda h: self.join(h, passed[0], call))

    def read(self, *args: Any) -> Tensor | None:
        """Returns the values that `join` needs in addition to the branch's output. Called after the last matrix has
        run."""
        return None

    def join(self, h: Tensor, read: Tensor | None, end: Callable[..., Any] | None) -> Tensor:
        """Returns the branch's output with the adapter applied; `end` calls the module at which the branch ends."""
        if self.order is None:
            return self.adapt(h)
        back = sorted(range(h.dim()), key=self.order.__getitem__)
        return self.adapt(h.permute(back)).permute(self.order)

    def adapt(self, h: Tensor) -> Tensor:
        """Returns the branch's output with the adapter applied, in the layout of the last matrix."""
        raise NotImplementedError


class Bypass(AtBranchEnd):
    """Adds `beside`, computed from a branch's input, to the branch's output; features are last in both.

    Raises:
        UnsupportedSite: the branch's output has another number of tokens than its input.
        RouteError: the first matrix of the branch is not called, so rows of a batch cannot be distinguished.
    """

    observes = frozenset({"first", "norm"})

    def __init__(self, site: BranchSite) -> None:
        super().__init__(site)
        pointwise = all(size == 1 for size in (*site.kernel, *getattr(self.layer, "stride", ())))
        if self.layer.one_hot or (self.layer.channel_dim != -1 and not pointwise):
            raise UnsupportedSite(
                f"{site.path}: a bypass needs a module that returns as many tokens as it gets; exclude it"
            )
        self.first = Tap() if any(place.form == "first" for place in site.places) else None
        self.norm = Tap()

    def at(self, form: str, module: Any) -> Callable[..., Any]:
        forms = {"first": self._at_first, "norm": self._at_norm, END: self._at_end, ENTERED: self._at_sum}
        return forms.get(form, self)

    def _at_norm(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = call(x, *args, **kwargs)
        self.norm.take()
        self.norm.put((x, y))
        return y

    def _at_first(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        before, after = self.norm.get() or (x, x)
        assert self.first is not None, "only places with this form call it"
        self.first.put(before if after is x else x)
        return call(x, *args, **kwargs)

    def _at_sum(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.passed is not None, "only places with this form call it"
        passed = self.passed.take()
        return call(x if passed is None else self.join(x, passed[0], None), *args, **kwargs)

    def read(self, x: Tensor, *args: Any) -> Tensor:
        self.norm.take()
        read = x if self.first is None else self.first.take()
        if read is None:
            raise RouteError(
                f"{type(self).__name__}: the branch's first matrix is not called, so rows cannot be routed; use one "
                "adapter for the whole batch"
            )
        return read

    def join(self, h: Tensor, read: Tensor | None, end: Callable[..., Any] | None) -> Tensor:
        assert read is not None, "`read` returns it"
        read = read.to(h.dtype)
        added = self._beside(read, h)
        return self.kept(h, read) + (added if end is None else self.dropped(added, end))

    def kept(self, h: Tensor, read: Tensor) -> Tensor:
        """Returns the part of the branch's output that is kept, by default all of it. An operator that changes the
        output needs `branch` to be called with ``adds=False``.

        Args:
            h: the output, as it joins the stream.
            read: the operator's input, in the layout of the branch's input; `laid_out` converts tensors computed from
                it to the layout of `h`.
        """
        return h

    def laid_out(self, made: Tensor) -> Tensor:
        """Returns a tensor computed from the input, ``[batch, ..., features]``, in the layout of the branch's
        output."""
        made = self.layer.channels_back(made)
        return made if self.order is None else made.permute(self.order)

    def dropped(self, added: Tensor, end: Callable[..., Any]) -> Tensor:
        """Returns the summand after the host's dropout or scaling at the end of the branch. `end` calls the module at
        which the branch ends. By default the summand is returned unchanged."""
        return added

    def _beside(self, read: Tensor, y: Tensor) -> Tensor:
        added = self.laid_out(self.beside(self.layer.channels_last(read)))
        if added.shape != y.shape:
            raise UnsupportedSite(
                f"{type(self).__name__}: the branch reads {tuple(read.shape)} and returns {tuple(y.shape)}, so a "
                "bypass cannot be added to it; exclude this block"
            )
        return added

    def beside(self, x: Tensor) -> Tensor:
        """Returns the summand for an input ``[batch, ..., features]``, in the dtype of the branch's output.

        Raises:
            UnsupportedSite: the features do not have the layout that the method needs.
        """
        raise NotImplementedError


def branch_end(surgeon: Surgeon, site: Site, joins: Joins = "stream", *, adds: bool = False) -> BranchSite:
    """Returns a site, the last matrix of a branch, with the module after which the branch is added to the stream, if
    that is another module.

    If the host drops or scales a branch's output by code outside of a module, an operator that `adds` to the branch
    without reading its output (`Bypass`) is added to the sum of branch and stream, if a module returns that sum or has
    it as its input. Otherwise the operator acts at the last module of the branch, or at the site itself, and the
    surgeon's notices say so.
    """
    end = surgeon.resolver.end_of(site.module_path) if joins == "stream" else None
    if end is None:
        return BranchSite(**vars(site))
    path, form = (end.entered, ENTERED) if end.entered is not None else (end.left, END)
    if adds and end.rest and path is not None:
        return BranchSite(**vars(site), places=(replace(surgeon.resolver.site(path, "weight"), form=form),))
    if end.rest:
        _say(surgeon, _ACTS[end.rest], end.path or site.module_path)
    if end.path is None:
        return BranchSite(**vars(site))
    place = replace(surgeon.resolver.site(end.path, "weight"), form=END)
    return BranchSite(**vars(site), places=(place,), order=end.order, drops_path=end.drops_path)


_ACTS = {
    "dropout": "the host drops outputs of branches by a function",
    "scale": "the host scales outputs of branches by a parameter or a number",
    "unknown": "the host's code, which cannot be analyzed, may drop or scale outputs of branches",
}


def _say(surgeon: Surgeon, acts: str, path: str) -> None:
    """Add to the notices what acts on an adapter that joins at a path, in one line for all such paths."""
    begin, where = f"{surgeon.method.name}: {acts}, including outputs of its adapters, after ", stack_of(path)
    known = next((each for each in surgeon.notices if each.startswith(begin)), begin)
    listed = known.removeprefix(begin).split(", ") if known != begin else []
    if where not in listed:
        surgeon.notices[:] = [each for each in surgeon.notices if each != known] + [begin + ", ".join([*listed, where])]


def stack_of(path: str) -> str:
    """Returns a path with `*` for its numbers: the same for all blocks of a stack."""
    return re.sub(r"\b\d+\b", "*", path)


def branch(
    surgeon: Surgeon, site: Site, *, before_norm: bool = False, joins: Joins = "stream", adds: bool = True
) -> BranchSite:
    """Returns a site as the end of a branch, with the module after which the branch is added to the stream
    (`branch_end`). With `before_norm`, the operator also acts at the norms of the block. With `adds`, the operator only
    adds to the branch's output; without it, the operator may change that output.

    Raises:
        UnsupportedSite: no matrix is known that reads the input of the branch.
    """
    host = surgeon.resolver.host
    last = next((entry for entry in host.at(site.module_path) if entry.role in FIRST), None)
    if last is None:  # a matrix, or a mixture or an attention, whose output has the width of the stream
        width = site.in_features if site.tensor == "weight" else site.out_features
        return replace(branch_end(surgeon, site, joins, adds=adds), width=width)
    inside = [entry for entry in host.entries if entry.block == last.block]
    first = [entry for entry in inside if entry.role in FIRST[last.role]]
    nearest = max(first, key=lambda entry: _steps_shared(entry.path, last.path), default=None)
    if nearest is None:
        raise UnsupportedSite(f"{site.path}: found no matrix that reads the input of its branch; exclude it")
    norms = [entry for entry in inside if entry.role == "norm" and entry.kind == "norm" and last.block is not None]
    places = [(entry, "first") for entry in _readers(surgeon, inside, nearest)]
    places += [(norm, "norm") for norm in norms if before_norm]
    sites = (replace(surgeon.resolver.site(e.module, "weight", e.role), form=form) for e, form in places)
    width = surgeon.resolver.site(nearest.module, nearest.tensor or "weight").in_features
    end = branch_end(surgeon, site, joins, adds=adds)
    return replace(end, width=width, places=(*sites, *end.places))


def _readers(surgeon: Surgeon, inside: list[HostEntry], first: HostEntry) -> list[HostEntry]:
    """Returns the modules that may get the input of a branch: its first matrix; and before that the attention around
    it, where that keeps the matrix's bias, and so may read the weight without calling the matrix (BEiT, EVA, Swin V2).
    """
    around = [e for e in inside if e.role in ("attn", "cross") and first.path.startswith(f"{e.path}.")]
    nearest = sorted(around, key=lambda entry: len(entry.path))[-1:]
    if not first.called or first.tensor is not None:
        if not nearest:
            raise UnsupportedSite(
                f"{first.path} is read without being called, and the module that reads it was not found; exclude this "
                "block"
            )
        return nearest
    bare = surgeon.resolver.site(first.module, "weight").missing("bias")
    modules = [surgeon.resolver.modules[entry.path] for entry in nearest]
    keeps = any(p is not None and p.dim() == 1 for module in modules for p in module._parameters.values())
    return [*nearest, first] if bare and keeps else [first]


def _steps_shared(path: str, other: str) -> int:
    """Returns the number of steps from the host down that two paths have in common."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(path.split("."), other.split("."), strict=False))))


def reads_stream(surgeon: Surgeon, site: Site) -> bool:
    """Whether a site is a matrix that reads the hidden states of its block or their norm: the matrices of queries, keys
    and values, and the first matrices of a feed-forward, but not the matrices of cross-attention that read another
    stream."""
    return any(entry.role in READ_STREAM for entry in surgeon.resolver.host.at(site.module_path))


def is_post_norm(resolver: Resolver, block: str) -> bool:
    """Whether the norms of a block are after its branches, not before them. Torch's layers have an attribute for this;
    other hosts that normalize before branches have one more norm after their blocks.
    """
    module, host = resolver.modules[block], resolver.host
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return not module.norm_first
    stacks = [entry.path for entry in host.entries if entry.role.startswith("stack") and under(block, entry.path)]
    stack, tower = max(stacks, key=len, default=""), host.at(block)[0].tower  # heads have norms of their own
    finals = [entry for entry in host.entries if entry.role == "norm.final" and entry.tower == tower]
    return not any(under(entry.path, stack) for entry in finals)
