"""The inverse second moment of texts, and the encodings of a concept and of its class as moving averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Batches, Checked, Shared, Tap, forward_context, full_precision, watched_inputs
from peftcore.errors import CalibrationError, SequenceError, TrainingError
from peftcore_diffusion._told import told

LEARNING = Tap()
"""The texts of the adapter whose concept learns in this forward, by width of encodings."""


class Texts(Checked):
    """The inverse of C = E[e e'] of the encodings of texts, [dim, dim]; that of I before it has seen any."""

    inverse: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.eye(width))

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        inverse = values.get("inverse")
        if inverse is not None and not (inverse.isfinite().all() and inverse.diagonal().gt(0).all()):
            yield "inverse holds numbers that no inverse of E[e e'] has"

    @torch.no_grad()
    def learn(self, C: Tensor, damping: float) -> None:
        """Take the inverse of ``C + damping * mean(diag C) I``, C in float64.

        Raises:
            CalibrationError: the matrix is singular or not finite.
        """
        root, failed = torch.linalg.cholesky_ex(C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype))
        if failed or not root.isfinite().all():
            raise CalibrationError(
                "E[e e'] of these texts has no inverse: give more of them, all finite, or a larger damping"
            )
        self.inverse.copy_(torch.cholesky_inverse(root))


class Concept(Checked):
    """The mean encodings of a concept, i [dim], and of its class in its place, s [dim].

    Args:
        width: of encodings.
        decay: how much of the averages a step of training keeps.
        follows: whether s is updated with the class encodings that calls pass; else s keeps the data's encoding.
    """

    i: Tensor
    s: Tensor

    def __init__(self, width: int, decay: float, follows: bool) -> None:
        super().__init__()
        self.decay, self.follows, self.used = decay, follows, Tap(until_backward=True)
        self.register_buffer("i", torch.zeros(width))
        self.register_buffer("s", torch.zeros(width))

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        if "i" in values and not values["i"].any():
            yield "i holds zeros, of which no text has a share"

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return i and s for a text [batch, tokens, dim]: as they are, in evaluation; in training with the text's part
        in them, of which i has the gradient.

        Raises:
            MissingContext: a call in training does not pass the concept's positions.
            RouteError: the positions are for another number of rows.
            SequenceError: a position is outside the text.
        """
        if not self.training:
            return self.i, self.s
        where = told("concept", len(text))
        new = picked(text, where).to(self.i.dtype)
        # What a checkpoint repeats in backward is computed with the averages of then.
        held = self.used.get() if forward_context().repeating else None
        if held is None:
            held = self._moved(new.detach(), where)
            self.used.put(held)
        i, s = held
        return i + (new - new.detach()), s

    @torch.no_grad()
    def _moved(self, new: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        i, s = torch.lerp(new, self.i, self.decay), self.s.clone()
        if self.follows and "superclass" in forward_context().context:
            s = torch.lerp(picked(told("superclass", len(where)), where).to(s), s, self.decay)
        self.i.copy_(i)
        self.s.copy_(s)
        return i, s


def check_alone(texts: Shared, width: int, first: bool) -> None:
    """Check that a call trains a single concept, where rows are not assigned to adapters.

    Args:
        texts: those of the adapter.
        width: of their encodings.
        first: whether this concept is the first to edit the text.

    Raises:
        TrainingError: several concepts would train.
    """
    learning = LEARNING.get() or {}
    if not first or (forward_context().rows is None and learning.get(width, texts) is not texts):
        raise TrainingError(
            "two concepts are active, and calls in training say where one is: activate one to train it, and several in "
            "evaluation"
        )
    LEARNING.put({**learning, width: texts})


def picked(states: Tensor, where: Tensor) -> Tensor:
    """Return the mean encoding of the tokens at `where` [batch] in states [batch, tokens, dim].

    Raises:
        SequenceError: the states have another form, or no such tokens; where `where` is on an accelerator, whose
            values are not waited for, torch says that.
    """
    known = where.device.type == "cpu"
    if states.dim() != 3 or (known and not 0 <= int(where.min()) <= int(where.max()) < states.shape[1]):
        raise SequenceError(f"a concept is at {where.tolist()} of [batch, tokens, dim], not of {tuple(states.shape)}")
    places = where.to(states.device).view(-1, 1, 1).expand(-1, 1, states.shape[-1])
    return states.gather(1, places).mean((0, 1))


def seen_texts(
    model: nn.Module, modules: Iterable[nn.Module], data: Batches
) -> tuple[dict[int, Tensor], dict[nn.Module, Tensor]]:
    """Return statistics of the modules' inputs: by width of encodings the sum of e e' over all texts, which is C up to
    a factor that cancels in r; and by module the mean encoding of the class, at the positions that the batches' labels
    contain. Padding that the model's `attention_mask` says is left out.

    Raises:
        CalibrationError: all batches lack labels, or a label is not a position in its text.
    """
    sums: dict[int, Tensor] = {}
    last: dict[int, Any] = {}
    found: dict[nn.Module, list[Tensor]] = {}
    where: Tensor | None = None

    def look(module: nn.Module, given: Tensor, x: Tensor) -> None:
        width = x.shape[-1]
        if given is not last.get(width):  # most layers are given one and the same tensor
            with full_precision(x):
                sums[width] = sums.get(width, 0) + (x.mT @ x).cpu().double()
            last[width] = given
        if where is not None:
            if given.dim() != 3 or where.shape != given.shape[:1] or not all(0 <= n < given.shape[1] for n in where):
                raise CalibrationError(
                    f"the class is at {where.tolist()}, a place for each text, in texts of {tuple(given.shape)}"
                )
            found.setdefault(module, []).extend(given.to(x.dtype)[torch.arange(len(where)), where])

    with torch.no_grad(), watched_inputs(model, modules, look):
        for batch in data:
            where = batch.beside
            batch.output()
    if sums and not found:
        raise CalibrationError(
            "data has to say where the class of the concept is, in some texts: peftcore.Labelled(batch, positions)"
        )
    return sums, {module: torch.stack(encodings).mean(0) for module, encodings in found.items()}
