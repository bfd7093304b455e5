"""Adapters parallel to a branch of a block: where the branch begins and ends, and how its input, or the input of the
norm before it, is carried to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from peftcore.contract.operators import Operator, on_first
from peftcore.errors import RouteError, UnsupportedSite
from peftcore.forward.context import Tap
from peftcore.roles import HostEntry
from peftcore.roles.hostmap import under
from peftcore.surgery.surgeon import Surgeon
from peftcore.targets.resolver import Resolver
from peftcore.targets.sites import Site

FIRST = {
    "mlp.down": {"mlp.gate_up", "mlp.gate", "mlp.up"},
    "attn.out": {"attn.qkv", "attn.q", "attn.q_a"},
    "cross.out": {"cross.qkv", "cross.q", "cross.q_a"},
    "attn_mlp.out": {"attn_mlp.in", "attn.qkv", "attn.q"},
}
"""By the role of a branch's last matrix, the roles of the first ones, which read the input of the branch."""


@dataclass(frozen=True, eq=False)
class BranchSite(Site):
    """The last matrix of a branch, with the modules that read its input. A module that ends no branch is one by
    itself."""

    width: int = 0
    """The number of features of the branch's input."""
    places: tuple[Site, ...] = ()
    """Further sites of the operator: modules that read the input (form "first"), and the block's norms ("norm")."""


class Bypass(Operator):
    """Adds `beside` of a branch's input to the branch's output; features are last in both.

    Raises:
        UnsupportedSite: there are not as many tokens behind the branch as in front of it.
        RouteError: the first matrix of the branch is not called, so rows of a batch cannot be told apart.
    """

    observes = frozenset({"first", "norm"})

    def __init__(self, site: BranchSite) -> None:
        super().__init__(site)
        pointwise = all(size == 1 for size in (*site.kernel, *getattr(self.layer, "stride", ())))
        if self.layer.one_hot or (self.layer.channel_dim != -1 and not pointwise):
            raise UnsupportedSite(f"{site.path}: a bypass needs as many tokens behind the module as in front of it")
        self.first = Tap() if any(place.form == "first" for place in site.places) else None
        self.norm = Tap()

    def at(self, form: str, module: Any) -> Callable[..., Any]:
        return {"first": self._at_first, "norm": self._at_norm}.get(form, self)

    def _at_norm(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = call(x, *args, **kwargs)
        self.norm.take()
        self.norm.put((x, y))
        return y

    def _at_first(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        before, after = self.norm.get() or (x, x)
        assert self.first is not None, "it stands there for that"
        self.first.put(before if after is x else x)
        return call(x, *args, **kwargs)

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = call(x, *args, **kwargs)
        self.norm.take()
        read = x if self.first is None else self.first.take()
        if read is None:
            raise RouteError(
                f"{type(self).__name__}: the branch's first matrix is not called, so rows cannot be routed"
            )
        return on_first(output, lambda y: y + self._beside(read.to(y.dtype), y))

    def _beside(self, read: Tensor, y: Tensor) -> Tensor:
        dim = self.layer.channel_dim
        added = self.beside(read.movedim(dim, -1)).movedim(-1, dim)
        if added.shape != y.shape:
            raise UnsupportedSite(
                f"{type(self).__name__}: the branch reads {tuple(read.shape)} and returns {tuple(y.shape)}, so nothing "
                "can go past it; exclude= this block"
            )
        return added

    def beside(self, x: Tensor) -> Tensor:
        """Returns the summand for ``[batch, ..., features]``, in the dtype of the branch's output.

        Raises:
            UnsupportedSite: the features are not laid out as the method needs them.
        """
        raise NotImplementedError


def branch(surgeon: Surgeon, site: Site, *, before_norm: bool = False) -> BranchSite:
    """Returns a site as the end of a branch; with `before_norm`, its operator also acts at the norms of the block.

    Raises:
        UnsupportedSite: no matrix is known that reads the input of the branch.
    """
    host = surgeon.resolver.host
    last = next((entry for entry in host.at(site.module_path) if entry.role in FIRST), None)
    if last is None:  # a matrix, or a mixture or an attention, whose output has the width of the stream
        return BranchSite(**vars(site), width=site.in_features if site.tensor == "weight" else site.out_features)
    inside = [entry for entry in host.entries if entry.block == last.block]
    first = [entry for entry in inside if entry.role in FIRST[last.role]]
    nearest = max(first, key=lambda entry: _steps_shared(entry.path, last.path), default=None)
    if nearest is None:
        raise UnsupportedSite(f"{site.path}: no matrix is known that reads what its branch reads")
    norms = [entry for entry in inside if entry.role == "norm" and entry.kind == "norm" and last.block is not None]
    places = [(entry, "first") for entry in _readers(surgeon, inside, nearest)]
    places += [(norm, "norm") for norm in norms if before_norm]
    sites = (replace(surgeon.resolver.site(e.module, "weight", e.role), form=form) for e, form in places)
    width = surgeon.resolver.site(nearest.module, nearest.tensor or "weight").in_features
    return BranchSite(**vars(site), width=width, places=tuple(sites))


def _readers(surgeon: Surgeon, inside: list[HostEntry], first: HostEntry) -> list[HostEntry]:
    """Returns the modules that may get the input of a branch: its first matrix; and before that the attention around
    it, where that keeps the matrix's bias, and so may read the weight without calling the matrix (BEiT, EVA, Swin V2).
    """
    around = [e for e in inside if e.role in ("attn", "cross") and first.path.startswith(f"{e.path}.")]
    nearest = sorted(around, key=lambda entry: len(entry.path))[-1:]
    if not first.called or first.tensor is not None:
        if not nearest:
            raise UnsupportedSite(f"{first.path} is read, not called, and no module is known that reads it")
        return nearest
    bare = surgeon.resolver.site(first.module, "weight").missing("bias")
    modules = [surgeon.resolver.modules[entry.path] for entry in nearest]
    keeps = any(p is not None and p.dim() == 1 for module in modules for p in module._parameters.values())
    return [*nearest, first] if bare and keeps else [first]


def _steps_shared(path: str, other: str) -> int:
    """Returns the number of steps from the host down that two paths have in common."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(path.split("."), other.split("."), strict=False))))


def is_post_norm(resolver: Resolver, block: str) -> bool:
    """Whether norms come after the branches of a block, and not before them. Torch's layers have an attribute for it;
    other hosts that normalize before branches have one more norm after their blocks."""
    module, host = resolver.modules[block], resolver.host
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return not module.norm_first
    stacks = [entry.path for entry in host.entries if entry.role.startswith("stack") and under(block, entry.path)]
    stack, tower = max(stacks, key=len, default=""), host.at(block)[0].tower  # heads have norms of their own
    finals = [entry for entry in host.entries if entry.role == "norm.final" and entry.tower == tower]
    return not any(under(entry.path, stack) for entry in finals)
