"""Adapters at the end of a branch, or in parallel with the branch. A branch is the part of a block, such as attention
or feed-forward, whose output is added to the hidden states (the stream).

This module finds the first and the last modules of a branch. An adapter acts at the last one, and gets the branch's
input, or the input of the norm before the branch.
"""

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
"""Roles of the first matrices of a branch, by the role of its last matrix. The first matrices have the branch's input
as input."""
READ_STREAM = frozenset({"attn.k", "attn.v", "attn.kv"}).union(*FIRST.values())
"""Roles of the matrices whose input is the hidden states of the block."""

Joins = Literal["stream", "matrix"]
"""The point of a branch at which an adapter acts. "matrix": the output of the branch's last matrix. "stream": the point
where the branch is added to the hidden states (the stream), after dropout, layer scale, stochastic depth or a norm.
"""
END, ENTERED = "end", "entered"
"""Forms of sites. "end": the last module of a branch, before the branch is added to the hidden states. "entered": a
module whose input is the sum of hidden states and branch."""


@dataclass(frozen=True, eq=False)
class BranchSite(Site):
    """A site at the last matrix of a branch. It also has the modules that get the branch's input, and the last module
    of the branch. A target that is not the last matrix of a known branch is treated as a branch of one module."""

    width: int = 0
    """The number of features of the branch's input."""
    places: tuple[Site, ...] = ()
    """Further sites of the operator, by form. "first": modules that get the branch's input. "norm": norms of the block.
    "end": the last module of the branch. "entered": a module whose input is the sum of hidden states and branch."""
    order: Order | None = None
    """The order of the dimensions in the branch's output, if it differs from that in the output of the last matrix;
    otherwise None."""
    drops_path: bool = False
    """Whether the module at the end of the branch is stochastic depth."""


class AtBranchEnd(Operator):
    """Base class of operators that change the output of a branch. They act after the last module of the branch, or at
    its last matrix if there is no other module. One module, such as a dropout, may end several branches. So `forward`,
    which runs at the last matrix, records which branch is running.
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
        """Returns a tensor that `join` needs in addition to the branch's output, or None. Called after the last matrix
        has run."""
        return None

    def join(self, h: Tensor, read: Tensor | None, end: Callable[..., Any] | None) -> Tensor:
        """Returns the branch's output with the adapter applied, for `h`, the branch's output. `read` is the result of
        the function of that name. `end` calls the last module of the branch; it is None if the adapter acts
        elsewhere."""
        if self.order is None:
            return self.adapt(h)
        back = sorted(range(h.dim()), key=self.order.__getitem__)
        return self.adapt(h.permute(back)).permute(self.order)

    def adapt(self, h: Tensor) -> Tensor:
        """Returns the branch's output with the adapter applied, in the layout of the last matrix."""
        raise NotImplementedError


class Bypass(AtBranchEnd):
    """Base class of operators that add a tensor to a branch's output. The tensor is computed by `beside` from the
    branch's input.

    Raises:
        UnsupportedSite: the branch's output has another number of tokens than its input.
        RouteError: the branch's first matrix is not called as a module, so in a route the rows of its input cannot be
            assigned to adapters.
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
        """Returns the tensor that takes the place of the branch's output in the sum; by default the output itself. If
        an operator overrides this, call `branch` with ``adds=False``.

        Args:
            h: the branch's output, as the host adds it to the hidden states.
            read: the branch's input, or the input of the norm before it. `laid_out` converts tensors computed from it
                to the layout of `h`.
        """
        return h

    def laid_out(self, made: Tensor) -> Tensor:
        """Returns a tensor ``[batch, ..., features]``, computed from the branch's input, converted to the layout of the
        branch's output."""
        made = self.layer.channels_back(made)
        return made if self.order is None else made.permute(self.order)

    def dropped(self, added: Tensor, end: Callable[..., Any]) -> Tensor:
        """Returns the tensor to add, after applying the host's dropout or scaling at the end of the branch to it. `end`
        calls the last module of the branch. By default the tensor is returned unchanged."""
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
        """Returns the tensor to add to the branch's output, given the branch's input ``[batch, ..., features]``, in the
        dtype of the branch's output.

        Raises:
            UnsupportedSite: the features do not have the layout that the method needs.
        """
        raise NotImplementedError


def branch_end(surgeon: Surgeon, site: Site, joins: Joins = "stream", *, adds: bool = False) -> BranchSite:
    """Returns a `BranchSite` for the last matrix of a branch. It includes the last module of the branch, if that is
    another module.

    A host may apply dropout or scaling to a branch's output by code outside of a module. With `adds` (the operator only
    adds to the branch, as `Bypass` does), the operator then acts on the sum of hidden states and branch, if some module
    returns that sum or gets it as input. Otherwise it acts at the last module of the branch, or at the site itself, and
    the user is notified that dropout or scaling is also applied to its output.
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
    """Add a notice about dropout or scaling that the host applies to the adapter's output at a path. There is one
    notice for all such paths."""
    begin, where = f"{surgeon.method.name}: {acts}, including outputs of its adapters, after ", stack_of(path)
    known = next((each for each in surgeon.notices if each.startswith(begin)), begin)
    listed = known.removeprefix(begin).split(", ") if known != begin else []
    if where not in listed:
        surgeon.notices[:] = [each for each in surgeon.notices if each != known] + [begin + ", ".join([*listed, where])]


def stack_of(path: str) -> str:
    """Returns a path with every number replaced by `*`. It is the same for all blocks of one stack."""
    return re.sub(r"\b\d+\b", "*", path)


def branch(
    surgeon: Surgeon, site: Site, *, before_norm: bool = False, joins: Joins = "stream", adds: bool = True
) -> BranchSite:
    """Returns a `BranchSite` for the last matrix of a branch, as `branch_end` does. It also has the modules that get
    the branch's input. With `before_norm`, it has the norms of the block too, for operators that use the input of the
    norm before the branch. `adds` says that the operator only adds to the branch's output, and does not change it
    otherwise.

    Raises:
        UnsupportedSite: no matrix was found whose input is the input of the branch.
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
    """Returns the modules that may get the input of a branch. This is its first matrix. In some models (BEiT, EVA, Swin
    V2) the attention module stores the bias of that matrix, and may use the matrix's weight without calling it. Then
    the attention module is returned too.
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
    """Returns the number of path components that two paths have in common at their start."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(path.split("."), other.split("."), strict=False))))


def reads_stream(surgeon: Surgeon, site: Site) -> bool:
    """Whether a site is a matrix whose input is the hidden states of its block, perhaps after a norm. These are the
    matrices of queries, keys and values, and the first matrices of a feed-forward. The matrices of cross-attention for
    keys and values are not among them, because their input is another sequence."""
    return any(entry.role in READ_STREAM for entry in surgeon.resolver.host.at(site.module_path))


def is_post_norm(resolver: Resolver, block: str) -> bool:
    """Whether a block has its norms after its branches, not before them. Layers of torch have an attribute for this.
    For other hosts, a final norm after all blocks means that the norms are before the branches.
    """
    module, host = resolver.modules[block], resolver.host
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return not module.norm_first
    stacks = [entry.path for entry in host.entries if entry.role.startswith("stack") and under(block, entry.path)]
    stack, tower = max(stacks, key=len, default=""), host.at(block)[0].tower  # heads have norms of their own
    finals = [entry for entry in host.entries if entry.role == "norm.final" and entry.tower == tower]
    return not any(under(entry.path, stack) for entry in finals)
