"""Which tokens go through a branch of a block: a gate for each that is open or closed, and learns as if it were not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.author import (
    BranchSite,
    Bypass,
    ForwardContext,
    MethodConfig,
    Operator,
    Surgeon,
    Tap,
    by_row,
    forward_context,
    full_precision,
)
from peftcore.errors import TrainingError
from peftcore_vision._patches import patch_sites


class Gated(Protocol):
    """Options of gates."""

    temperature: float
    threshold: float
    prefix_tokens: int | None
    init_std: float
    init_bias: float


@dataclass(frozen=True)
class Taps:
    """The taps that the gates of an adapter share."""

    everyone: Tap = field(default_factory=Tap)
    """Whether all tokens go through, in a separate pass."""
    counts: Tap = field(default_factory=Tap)
    """For each block that ran in training the sum of its gates and how many they are, numbers without dimensions, so
    that routes do not split them by rows."""
    lies: dict[str, Tap] = field(default_factory=dict)
    """One channel of a tower's patches, ``[images, rows, columns]``, by path of the convolution that embeds them."""

    def graft(self, surgeon: Surgeon, site: BranchSite, make: Callable[..., Operator], config: MethodConfig) -> None:
        """Graft an operator that ``make(site, config, taps=..., lie=...)`` returns."""
        patches = patch_sites(surgeon, site)
        tower = patches[0].path if patches else ""
        seen = () if tower in self.lies else tuple(patches)
        lie = self.lies.setdefault(tower, Tap(until_backward=True))
        surgeon.graft(site, make, config, (*site.places, *seen), taps=self, lie=lie)


class Dispatcher(Bypass):
    """Gates the output of a branch, token by token; `beside` is added in parallel.

        m = 1 where sigmoid(w . x + b) > threshold,   in training: where sigmoid((w . x + b + g - g') / temperature) is

    with draws g and g' of Gumbel's distribution; gradients are those of the sigmoid.
    """

    observes = Bypass.observes | {"patch"}
    training_only = Bypass.training_only | {"noise", "temperature"}

    def __init__(self, site: BranchSite, config: Gated, taps: Taps, lie: Tap) -> None:
        super().__init__(site)
        if config.prefix_tokens:
            site.check_rows_first()
        self.taps, self.lie, self.prefix_tokens = taps, lie, config.prefix_tokens
        self.temperature, self.threshold, self.noise = config.temperature, config.threshold, 1.0
        self.gate = nn.Parameter(torch.randn(site.width) * config.init_std)
        self.gate_bias = nn.Parameter(torch.full((1,), config.init_bias))

    def at(self, form: str, module: Any) -> Callable[..., Any]:
        return self._at_patches if form == "patch" else super().at(form, module)

    def _at_patches(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        patches = call(*args, **kwargs)  # [batch, features, rows, columns]
        self.lie.put(patches.detach()[:, 0])  # a route picks rows of tensors alone
        return patches

    def kept(self, h: Tensor, read: Tensor) -> Tensor:
        if self.taps.everyone.get():
            return h
        return h * self.laid_out(self.gates(self.layer.channels_last(read)).to(h.dtype))

    def gates(self, x: Tensor) -> Tensor:
        """Return 1 for tokens that go through the branch and 0 for others, ``[batch, ..., 1]``, of ``[batch, ...,
        features]``; in training take note of how many do."""
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
        """Return how many tokens in front always go through: those in front of the patches, where a picture was
        embedded and its patches are complete."""
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


def drawn(like: Tensor) -> Tensor:
    """Return differences of two draws of Gumbel's distribution."""
    first, second = (-torch.empty_like(like).exponential_().log() for _ in range(2))
    return first - second


def loss_of_share(taps: Taps, share: float) -> Tensor | None:
    """Take what gates noted and return ``(mean gate - share)^2``; None where nothing was noted."""
    counts = taps.counts.take()
    if not counts:
        return None
    through, tokens = (torch.stack(each).sum() for each in zip(*counts, strict=True))
    return (through / tokens - share).square()


def loss_of_everyone(taps: Taps, output: Any, call: ForwardContext) -> Tensor:
    """Return ``L(q) + KL(q | p)``, of a second pass q in which all tokens go through.

    Raises:
        TrainingError: the model returns no logits, or labels of their shape are missing.
    """
    given = call.inputs.get("labels")
    labels: Any = call.context.get("labels") if given is None else given
    p, q = _logits_of(output, labels), _logits_of(call.again({taps.everyone: True}), labels)
    target = q.detach().log_softmax(1)
    apart = (target.exp() * (target - p.log_softmax(1))).sum(1).mean()
    return F.cross_entropy(q, labels) + apart


def _logits_of(output: Any, labels: Any) -> Tensor:
    """Return the logits of classes in what a model returned ``[rows, classes]`` or ``[rows, classes, high, wide]``, in
    float32 at least."""
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and logits.dim() in (2, 4)
        and labels.shape == (logits if labels.is_floating_point() else logits[:, 0]).shape
    ):
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
    raise TrainingError(
        "dyt trains the model with all tokens too, which takes its logits [rows, classes] (or of each pixel) and their "
        "labels: give these to the model, or tell them by peftcore.call(model, labels=...); or take complete=0"
    )
