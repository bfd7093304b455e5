"""Packs several examples into one row of a batch. Tokens do not attend to other examples of their row: the position ids
of each example start at 0, and models of transformers separate examples by them, if no cache is used. Before training,
`check_apart` tests this on the model with its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import BadInput, PeftcoreError
from peftcore.forward.state.own_losses import IGNORED

Row = dict[str, list[int]]
"""``input_ids``, ``labels`` and, for packed examples, ``position_ids``."""


def packed(examples: Sequence[Row], length: int) -> list[Row]:
    """Return rows of at most `length` tokens. Examples are packed from the longest to the shortest, each into the
    fullest row that has room.

    The first token of each example is not a label, because the token before it belongs to another example.
    """
    rows: list[list[Row]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda each: len(each["input_ids"]), reverse=True):
        size = len(example["input_ids"])
        fitting = [number for number, left in enumerate(room) if left >= size]
        if fitting:
            number = min(fitting, key=lambda each: room[each])
        else:
            number = len(rows)
            rows.append([])
            room.append(length)
        rows[number].append(example)
        room[number] -= size
    return [_laid(row) for row in rows]


def _laid(examples: Sequence[Row]) -> Row:
    found: Row = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        found["input_ids"] += example["input_ids"]
        found["labels"] += [IGNORED, *example["labels"][1:]]
        found["position_ids"] += range(len(example["input_ids"]))
    return found


class PackedCollator:
    """Collates rows to a batch. The padding of shorter rows is a separate example without labels."""

    def __init__(self, padding: int) -> None:
        self.fill = {"input_ids": padding, "labels": IGNORED, "position_ids": 0}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        return {
            name: torch.tensor([[*row[name], *[fill] * (length - len(row[name]))] for row in rows])
            for name, fill in self.fill.items()
        }


def check_apart(model: nn.Module, injection: peftcore.Injection | None, vocabulary: int) -> None:
    """Check that the examples of a row do not influence each other: the outputs for an example must be the same alone,
    after a second example, and after a third one. During the check the adapter's parameters are changed at random,
    since many fresh adapters do not change outputs.

    Raises:
        BadInput: examples of one row change each other's outputs.
    """
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    one, two, text = (torch.randint(0, vocabulary, (count,), generator=draw) for count in (5, 5, 6))

    def of(before: Tensor) -> Tensor:
        ids = torch.cat([before, text])[None].to(device)
        places = torch.cat([torch.arange(len(before)), torch.arange(len(text))])[None].to(device)
        logits: Tensor = model(input_ids=ids, position_ids=places, use_cache=False).logits[0, len(before) :]
        return logits

    training = model.training
    try:
        with torch.no_grad(), _moved(injection):
            model.eval()
            alone, *behind = (of(before) for before in (text[:0], one, two))
    except (TypeError, PeftcoreError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"data.pack: this model cannot read several examples packed into one row ({reason}); remove data.pack"
        ) from None
    finally:
        model.train(training)
    tolerance = torch.finfo(alone.dtype).eps ** 0.5 * alone.abs().max()
    if any((each - alone).abs().max() > tolerance for each in behind):
        raise BadInput(
            "data.pack: with this model or method, examples packed into one row change each other's outputs; remove "
            "data.pack"
        )


@contextmanager
def _moved(injection: peftcore.Injection | None) -> Iterator[None]:
    """Context manager in which N(0, 0.02) is added to an adapter's parameters."""
    parameters = [] if injection is None else [*injection.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    draw = torch.Generator().manual_seed(0)
    try:
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.add_(0.02 * noise.to(parameter))
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
