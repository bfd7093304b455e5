"""Feed-forwards that compute the tokens alone which go through them, in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peftcore.author import BranchSite, Site, Surgeon, Tap, feed_forward_around, forward_context
from peftcore.errors import SequenceError, UnsupportedSite
from peftcore_vision.dyt.dispatch import Dispatcher, Gated, Taps

WHOLE, JOINED = "whole", "joined"
"""The forms of the site of a whole feed-forward: where the branch joins the stream behind it, and where it does so as
it leaves."""
GATHERED = Tap()
"""Whether what runs is given chosen tokens alone."""


class Skipping(Dispatcher):
    """Gathers the chosen tokens in front of a feed-forward, and puts what it returns back among zeros.

    Raises:
        SequenceError: another adapter has gathered tokens before.
    """

    def __init__(self, site: BranchSite, config: Gated, taps: Taps, lie: Tap) -> None:
        super().__init__(site, config, taps, lie)
        self.inside = Tap()

    def at(self, form: str, module: Any) -> Callable[..., Any]:
        forms = {WHOLE: self._at_whole, JOINED: self._at_joined}
        return forms.get(form) or super().at(form, module)

    def join(self, h: Tensor, read: Tensor | None, end: Callable[..., Any] | None) -> Tensor:
        return h if self.inside.get() else super().join(h, read, end)

    def _at_whole(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not self._skips(*args, **kwargs):
            return call(*args, **kwargs)
        y, read = self._skipped(call, *args)
        assert self.passed is not None, "it joins behind"
        self.passed.put((read,))
        return y

    def _at_joined(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not self._skips(*args, **kwargs):
            return call(*args, **kwargs)
        return self.join(*self._skipped(call, *args), None)

    def _skips(self, *args: Any, **kwargs: Any) -> bool:
        """Whether only chosen tokens are computed: a gradient wants to know of the others, torch.compile how many there
        are, and in a route a feed-forward runs once for the rows of all."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return False
        choice = forward_context().choice
        routed = choice is not None and choice.route is not None
        return not routed and len(args) == 1 and not kwargs and args[0].dim() > 2

    def _skipped(self, call: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the feed-forward makes of the chosen tokens, with zeros for the others, and the stream."""
        if GATHERED.get():
            raise SequenceError("two adapters would let tokens skip the same feed-forward: take skip=False for one")
        read = self._stream(x)
        chosen = self.gates(read).flatten(1) > 0  # [batch, tokens]
        count = max(int(chosen.sum(1).max()), 1)
        index = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
        real = chosen.gather(1, index).unsqueeze(-1)  # not those that fill up rows with fewer
        self.inside.put(True)
        GATHERED.put(True)
        y = call(x.flatten(1, -2).gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1])))
        self.inside.take()
        GATHERED.take()
        if self.passed is not None:
            self.passed.take()  # the last matrix has seen the chosen tokens
        whole = y.new_zeros(*chosen.shape, y.shape[-1])
        whole = whole.scatter(1, index.unsqueeze(-1).expand_as(y), torch.where(real, y, 0))
        return whole.view(*x.shape[:-1], -1), read

    def _stream(self, x: Tensor) -> Tensor:
        """Return what the norm in front read; x itself where none made it."""
        before, after = self.norm.get() or (x, x)
        return before if after is x else x


def skipping_site(surgeon: Surgeon, site: BranchSite) -> BranchSite:
    """Return a site with its feed-forward as one more place.

    Raises:
        UnsupportedSite: the site lacks a feed-forward, or the feed-forward is not a module, may mix tokens, or is
            scaled by code.
    """
    whole, end = feed_forward_around(surgeon, site), surgeon.resolver.end_of(site.module_path)
    if whole is None:
        raise UnsupportedSite(f"{site.path} is of no feed-forward that tokens could skip: take skip=False")
    mixes = [name for name, parameter in whole.module.named_parameters() if parameter.dim() > 2]
    if mixes:
        raise UnsupportedSite(f"{whole.path}: {mixes[0]} may mix tokens, so none of them can skip it: take skip=False")
    if end is None or end.rest:
        raise UnsupportedSite(f"{whole.path} does not end in a module, so no token can skip it: take skip=False")
    behind = end.path is not None and not f"{end.path}.".startswith(f"{whole.module_path}.")
    place: Site = replace(surgeon.resolver.site(whole.module_path, "weight"), form=WHOLE if behind else JOINED)
    return replace(site, places=(*site.places, place))
