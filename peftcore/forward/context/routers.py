"""Routers: operators that compute shares of several experts for each token, sequence or task, and can report these
shares.

All mixtures use the same terms. An *expert* is one of several updates of a module. The *gates* of a token (or of a
sequence or task) are its shares of the experts. *Soft* gates use all experts, *top-k* gates are zero except for k. A
choice whose gates are all zero is *dropped*. Statistics are collected only inside `Injection.reporting`. They are sums:
two numbers per expert and four more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from peftcore.contract.operators import Operator
from peftcore.forward.context.context import forward_context

Routes = Literal["token", "sequence", "task"]
"""The unit that has separate gates (shares of experts): a token, a sequence or a task."""
OTHERS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
"""Arguments for the decoder of an encoder-decoder model."""


class Gates(NamedTuple):
    """The gates (shares of experts) of one forward of a router, grouped by row."""

    shares: Tensor
    """``[rows, choices, experts]``: one choice per token, or several if a token chooses for each head or group."""
    counts: Tensor | None
    """``[rows, choices]`` of bool, False for choices of padding tokens. None if padding is absent or not known."""
    known: bool
    """Whether padding is known. It is not known if the user calls a part of the model directly, or if tokens cannot be
    assigned to rows."""


class Router(Operator):
    """An operator that computes shares of experts. Its forward calls `noted` with its gates."""

    routes: ClassVar[Routes] = "token"
    """The unit that has separate gates (shares of experts): "token" by default, or "sequence" or "task"."""
    ledger: Ledger | None = None
    """The sums of the gates, inside `Injection.reporting`; otherwise None."""

    def noted(self, gates: Tensor, dim: int = -1, inner: int = 0) -> None:
        """Add the gates of this forward to the statistics, inside `Injection.reporting`. Ignores forwards that backward
        repeats.

        Args:
            gates: for tokens, in the shapes that `by_row` accepts; for sequences and tasks, ``[rows, ..., experts]``.
            dim: the dimension of the experts. For a convolution, it is the dimension of the channels.
            inner: as in `by_row`.
        """
        if self.ledger is not None and not forward_context().repeating:
            gates = gates.detach().movedim(dim, -1)
            self.ledger.add(by_row(gates, inner) if self.routes == "token" else of_rows(gates))


def of_rows(gates: Tensor) -> Gates:
    """Returns the `Gates` for gates ``[rows, ..., experts]`` of sequences or tasks, which lack padding."""
    return Gates(gates.reshape(len(gates), -1, gates.shape[-1]), None, True)


def by_row(gates: Tensor, inner: int = 0) -> Gates:
    """Returns the `Gates` for gates of tokens. Padding is read from the model's attention mask.

    With a cache the mask also covers earlier tokens. Its last columns belong to this forward. Beams count as rows.

    Args:
        gates: ``[rows, tokens, *inner, experts]``; for images ``[rows, height, width, *inner, experts]``. If the module
            receives ``[rows * tokens, in]`` or one vector per row, ``[rows * tokens, *inner, experts]``.
        inner: the number of dimensions between tokens and experts, for example 1 if each head has gates.
    """
    places, each = gates.dim() - 1 - inner, math.prod(gates.shape[gates.dim() - 1 - inner : -1])
    if places == 0:
        return Gates(gates.reshape(1, each, -1), None, False)
    if places == 1:
        mask, known = _of_vectors(len(gates))
        rows, tokens = (len(gates), 1) if mask is None else mask.shape
    else:
        rows, tokens = len(gates), math.prod(gates.shape[1:places])
        mask, known = padding_mask(rows, tokens)
    counts = None if mask is None else mask.to(gates.device).repeat_interleave(each, 1)
    return Gates(gates.reshape(rows, tokens * each, -1), counts, known)


def _of_vectors(count: int) -> tuple[Tensor | None, bool]:
    """Returns the padding mask for a module that receives ``[rows * tokens, in]`` or one vector per row, and whether
    padding is known. The mask is None for one vector per row."""
    running = forward_context()
    mask = running.inputs.get("attention_mask")
    if running.of_two_streams or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None, bool(running.inputs) and mask is None
    if mask.numel() == count:
        return mask != 0, True
    return None, len(mask) == count


def padding_mask(rows: int, tokens: int) -> tuple[Tensor | None, bool]:
    """Returns a mask ``[rows, tokens]`` of bool from the model's arguments, False for padding, and whether padding is
    known. The mask is None if the arguments specify no padding for these tokens."""
    running = forward_context()
    inputs = running.inputs
    if not inputs:
        return None, False
    mask = inputs.get("attention_mask")
    if running.of_two_streams:
        others = [len(each[0]) for each in map(inputs.get, OTHERS) if isinstance(each, Tensor) and each.dim() > 1]
        return _of_two(mask, inputs.get("decoder_attention_mask"), others, rows, tokens)
    if not isinstance(mask, Tensor):
        return None, mask is None
    if mask.dim() != 2 or len(mask) != rows or mask.shape[1] < tokens or tokens != _new_tokens(inputs, tokens):
        return None, False
    return mask[:, mask.shape[1] - tokens :] != 0, True


def _new_tokens(inputs: Mapping[str, Any], otherwise: int) -> int:
    """Returns the number of tokens in a row of the model's input. A module of another tower, such as one for images,
    has a different number."""
    given = [inputs.get(name) for name in ("input_ids", "inputs_embeds")]
    return next((each.shape[1] for each in given if isinstance(each, Tensor) and each.dim() > 1), otherwise)


def _of_two(encoder: Any, decoder: Any, others: list[int], rows: int, tokens: int) -> tuple[Tensor | None, bool]:
    """Returns the padding mask of the encoder or of the decoder, and whether padding is known. It is the mask with the
    given number of tokens, if only one has it. `others` are the widths of the decoder's arguments."""
    if encoder is None and decoder is None:
        return None, True
    fits = [isinstance(each, Tensor) and each.shape == (rows, tokens) for each in (encoder, decoder)]
    if fits[0] and not fits[1] and tokens not in others:
        return encoder != 0, True
    if not fits[0] and (fits[1] or decoder is None):
        return (decoder != 0 if fits[1] else None), tokens in others
    return None, False


class Ledger:
    """The sums of the gates of one router, on the device of the gates.

    Attributes:
        forwards: the number of forwards of the router.
        known: whether padding was known in all of them.
    """

    def __init__(self) -> None:
        self.forwards, self.known = 0, True
        self._sums: Tensor | None = None

    def add(self, gates: Gates) -> None:
        """Add the gates of one forward."""
        shares = gates.shares.to(torch.float32 if gates.shares.device.type == "mps" else torch.float64)
        count = shares.shape[-1]
        counts = shares.new_ones(shares.shape[:-1]) if gates.counts is None else gates.counts.to(shares.dtype)
        sizes = shares.abs()
        whole = sizes.sum(-1)
        dropped = (whole == 0).to(shares.dtype)
        even = sizes / (whole + dropped).unsqueeze(-1)
        entropy = -torch.special.xlogy(even, even).sum(-1) / math.log(max(count, 2))
        each = torch.cat([even, (sizes > 0).to(shares.dtype)], -1)  # [rows, choices, 2 * experts]
        each = torch.cat([each, torch.stack([entropy, dropped, torch.ones_like(dropped)], -1)], -1)
        sums = (each * counts.unsqueeze(-1)).sum((0, 1))
        sums = torch.cat([sums, (1 - counts).sum()[None]])
        self._sums = sums if self._sums is None else self._sums + sums
        self.forwards, self.known = self.forwards + 1, self.known and gates.known

    @property
    def sums(self) -> list[float]:
        """First the sum of shares of each expert, then the number of choices of each expert. Then the sum of entropies,
        and three numbers of choices: dropped ones, all except padding, and padding. Empty before the first forward."""
        return [] if self._sums is None else self._sums.tolist()
