"""An adapter beside a feed-forward: it reads the residual stream in front of the feed-forward's norm, and adds to what
the feed-forward returns.

The operator stands at the branch's last matrix, and listens at its first one and at the norms of the block: the stream
is what went into the norm whose output the first matrix gets, or that itself where no norm is in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from torch import Tensor

from peftcore import Operator, Site, Surgeon, Tap, on_first
from peftcore.errors import RouteError, UnsupportedSite

FIRST = {
    "mlp.down": ("mlp.gate_up", "mlp.gate", "mlp.up"),
    "attn_mlp.out": ("attn_mlp.in", "attn.qkv", "attn.q"),
}
"""By the role of a feed-forward's last matrix, the roles of those that may be its first."""


@dataclass(frozen=True, eq=False)
class BranchSite(Site):
    """A last matrix; or a module that is a feed-forward by itself (a mixture of experts), which reads its input."""

    width: int = 0
    """Features of the stream."""
    places: tuple[Site, ...] = ()
    """Where the operator listens: the first matrix (form "first") and the norms (form "norm")."""


class BesideBranch(Operator):
    """Adds what `beside` makes of the stream."""

    def __init__(self, site: BranchSite) -> None:
        super().__init__(site)
        pointwise = all(size == 1 for size in (*site.kernel, *getattr(self.layer, "stride", ())))
        if self.layer.one_hot or (self.layer.channel_dim != -1 and not pointwise):
            raise UnsupportedSite(f"{site.path}: it gives other tokens than it gets, so nothing can go past it")
        self.stream = Tap() if site.places else None
        self.norm = Tap()

    def beside(self, x: Tensor) -> Tensor:
        """What is added, from ``[..., width]``."""
        raise NotImplementedError

    def at(self, form: str, module: Any) -> Callable[..., Any]:
        return {"first": self._first, "norm": self._norm}.get(form, self)

    def _norm(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = call(x, *args, **kwargs)
        self.norm.take()
        self.norm.put((x, y))
        return y

    def _first(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.stream is not None
        before, after = self.norm.get() or (x, x)
        self.stream.put(before if after is x else x)
        return call(x, *args, **kwargs)

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = call(x, *args, **kwargs)
        self.norm.take()
        stream = x if self.stream is None else self.stream.take()
        if stream is None:
            raise RouteError(f"{type(self).__name__}: the first matrix is not called, so rows cannot be routed")
        return on_first(output, lambda y: y + self._added(stream.to(y.dtype), y))

    def _added(self, stream: Tensor, y: Tensor) -> Tensor:
        dim = self.layer.channel_dim
        added = self.beside(stream.movedim(dim, -1)).movedim(-1, dim)
        if added.shape != y.shape:
            raise UnsupportedSite(
                f"{type(self).__name__}: the branch reads {tuple(stream.shape)} and returns {tuple(y.shape)}, so "
                "nothing can go past it; exclude= this block"
            )
        return added


def beside_branch(surgeon: Surgeon, site: Site) -> BranchSite:
    """The site with what its operator needs."""
    host, resolver = surgeon.resolver.host, surgeon.resolver
    last = next((entry for entry in host.at(site.module_path) if entry.role in FIRST), None)
    if last is None:
        return BranchSite(**vars(site), width=site.in_features if site.tensor == "weight" else site.out_features)
    block = [entry for entry in host.entries if entry.block == last.block]
    first = max(
        (entry for entry in block if entry.role in FIRST[last.role]),
        key=lambda entry: _steps_shared(entry.path, last.path),
        default=None,
    )
    if first is None or not first.called or first.tensor is not None:
        raise UnsupportedSite(f"{site.path}: no matrix is called that reads what its branch reads")
    norms = [entry for entry in block if entry.role == "norm" and entry.kind == "norm" and last.block is not None]
    listened = [(first, "first"), *((norm, "norm") for norm in norms)]
    places = tuple(replace(resolver.site(each.module, "weight", each.role), form=form) for each, form in listened)
    return BranchSite(**vars(site), width=places[0].in_features, places=places)


def _steps_shared(path: str, other: str) -> int:
    """How many steps from the host down two paths have in common."""
    steps = zip(path.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], steps))
