"""The operator of DyT: a gate of 0 or 1 for each token, whose gradient is that of a sigmoid, and a bottleneck for all
tokens. In evaluation the feed-forward can compute only the chosen tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.author import (
    BranchSite,
    Bypass,
    Site,
    Surgeon,
    Tap,
    by_row,
    feed_forward_around,
    forward_context,
    full_precision,
)
from peftcore.errors import SequenceError, UnsupportedSite
from peftcore_vision._patches import patch_sites

if TYPE_CHECKING:
    from peftcore_vision.dyt import DyTConfig

WHOLE, JOINED = "whole", "joined"
"""The two forms of a site at a whole feed-forward. `WHOLE`: a later module processes its output before it is added to
the residual stream. `JOINED`: its output is added directly."""
GATHERED = Tap()
"""True while a feed-forward runs on the chosen tokens only."""


@dataclass(frozen=True)
class Taps:
    """Values of the current forward that all operators of one adapter share."""

    everyone: Tap = field(default_factory=Tap)
    """True during the second pass, in which no token skips."""
    counts: Tap = field(default_factory=Tap)
    """For each block that ran in training: the sum of its gates and their number. They are scalar tensors, so that
    routes do not split them by rows."""
    lies: dict[str, Tap] = field(default_factory=dict)
    """One channel of the embedded patches, ``[images, rows, columns]``, by the path of the patch convolution."""

    def graft(self, surgeon: Surgeon, site: BranchSite, config: DyTConfig) -> None:
        """Install a `DyTOperator` at a site; it shares the values of this object."""
        patches = patch_sites(surgeon, site)
        tower = patches[0].path if patches else ""
        seen = () if tower in self.lies else tuple(patches)
        lie = self.lies.setdefault(tower, Tap(until_backward=True))
        surgeon.graft(site, DyTOperator, config, (*site.places, *seen), taps=self, lie=lie)


class DyTOperator(Bypass):
    """The dispatcher of one feed-forward and the parallel bottleneck. The dispatcher multiplies the feed-forward's
    output by a gate for each token.

    With `skip` it passes only the chosen tokens to the feed-forward, and fills the output of the other tokens with
    zeros.

    Raises:
        SequenceError: another adapter already selects tokens for the same feed-forward.
    """

    observes = Bypass.observes | {"patch"}
    training_only = Bypass.training_only | {"noise", "temperature"}
    padded = frozenset({"down.weight", "down.bias", "up.weight"})

    def __init__(self, site: BranchSite, config: DyTConfig, taps: Taps, lie: Tap) -> None:
        super().__init__(site)
        if config.prefix_tokens:
            site.check_rows_first()
        self.taps, self.lie, self.prefix_tokens, self.inside = taps, lie, config.prefix_tokens, Tap()
        self.temperature, self.threshold, self.noise = config.temperature, config.threshold, 1.0
        self.gate = nn.Parameter(torch.randn(site.width) * config.init_std)
        self.gate_bias = nn.Parameter(torch.full((1,), config.init_bias))
        self.down = nn.Linear(site.width, config.bottleneck)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.bottleneck, site.out_features)
        self.scale = config.scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def at(self, form: str, module: Any) -> Callable[..., Any]:
        forms = {"patch": self._at_patches, WHOLE: self._at_whole, JOINED: self._at_joined}
        return forms.get(form) or super().at(form, module)

    def beside(self, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = self.cast(x, self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        return self.scale * F.linear(self.dropout(torch.relu(F.linear(x, down, down_bias))), up, up_bias)

    def _at_patches(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        patches = call(*args, **kwargs)  # [batch, features, rows, columns]
        self.lie.put(patches.detach()[:, 0])  # a route picks rows of tensors alone
        return patches

    def kept(self, h: Tensor, read: Tensor) -> Tensor:
        if self.taps.everyone.get():
            return h
        return h * self.laid_out(self.gates(self.layer.channels_last(read)).to(h.dtype))

    def gates(self, x: Tensor) -> Tensor:
        """Return gates ``[batch, ..., 1]``, 1 for chosen tokens and 0 for others, for the residual stream ``[batch,
        ..., features]``. In training, record the sum of the gates."""
        precise = torch.promote_types(self.gate.dtype, torch.float32)
        with full_precision(x):
            logits = (x.to(precise) @ self.gate.to(precise) + self.gate_bias.to(precise)).unsqueeze(-1)
        prefix = self.prefix(x)
        logits = logits[:, prefix:] if prefix else logits
        if self.training and self.noise:
            logits = (logits + self.noise * drawn(logits)) / self.temperature
        soft = torch.sigmoid(logits)
        hard = (soft > self.threshold).to(precise) + (soft - soft.detach())
        gates = torch.cat([hard.new_ones(len(x), prefix, 1), hard], 1) if prefix else hard
        if self.training:
            self._note(gates, prefix)
        return gates

    def prefix(self, x: Tensor) -> int:
        """Return how many tokens at the start of each sequence the feed-forward always computes. By default these are
        all tokens in front of the patches, or 0 if the batch is not one sequence for each embedded picture."""
        if x.dim() != 3:
            return 0
        tokens, lie = x.shape[1], self.lie.get()
        if self.prefix_tokens is not None or lie is None:
            return min(self.prefix_tokens or 0, tokens)
        images, rows, columns = lie.shape
        return max(tokens - rows * columns, 0) if images == len(x) else 0

    def _note(self, gates: Tensor, prefix: int) -> None:
        counted = torch.ones_like(gates)
        if prefix:
            counted[:, :prefix] = 0
        shares, real, _ = by_row(torch.cat([gates * counted, counted], -1))
        through, tokens = (shares if real is None else shares * real.unsqueeze(-1)).sum((0, 1)).unbind()
        running = forward_context()
        running.check_loss_learns()
        if not running.repeating:
            self.taps.counts.put([*(self.taps.counts.take() or ()), (through, tokens)])

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
        """Return whether the feed-forward computes only the chosen tokens. It computes all tokens if gradients are
        needed, under torch.compile (which needs a fixed number of tokens), and in a route (where it runs once for the
        rows of all adapters)."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return False
        choice = forward_context().choice
        routed = choice is not None and choice.route is not None
        return not routed and len(args) == 1 and not kwargs and args[0].dim() > 2

    def _skipped(self, call: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feed-forward's output, which is zero for tokens that are not chosen, and the residual stream that
        the gates read."""
        if GATHERED.get():
            raise SequenceError(
                "two adapters would let tokens skip the same feed-forward: set skip=False for one of them"
            )
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
        """Return the input of the norm that computed x, or x itself if no norm computed it."""
        before, after = self.norm.get() or (x, x)
        return before if after is x else x


def drawn(like: Tensor) -> Tensor:
    """Return differences of two draws from Gumbel's distribution, in the shape of the logits."""
    first, second = (-torch.empty_like(like).exponential_().log() for _ in range(2))
    return first - second


def skipping_site(surgeon: Surgeon, site: BranchSite) -> BranchSite:
    """Return the site, extended by the whole feed-forward that contains it, so that tokens can skip this feed-forward.

    Raises:
        UnsupportedSite: the site is not part of a feed-forward module, or this module may mix tokens, or code outside
            of modules scales its output.
    """
    whole, end = feed_forward_around(surgeon, site), surgeon.resolver.end_of(site.module_path)
    if whole is None:
        raise UnsupportedSite(f"{site.path} is not part of a feed-forward that tokens could skip: set skip=False")
    mixes = [name for name, parameter in whole.module.named_parameters() if parameter.dim() > 2]
    if mixes:
        raise UnsupportedSite(
            f"{whole.path}: {mixes[0]} may mix tokens, so single tokens cannot skip it: set skip=False"
        )
    if end is None or end.rest:
        raise UnsupportedSite(f"{whole.path} does not end with a module, so tokens cannot skip it: set skip=False")
    behind = end.path is not None and not f"{end.path}.".startswith(f"{whole.module_path}.")
    place: Site = replace(surgeon.resolver.site(whole.module_path, "weight"), form=WHOLE if behind else JOINED)
    return replace(site, places=(*site.places, place))
