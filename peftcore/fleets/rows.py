"""Joins batches of several adapters along their rows, and selects rows of the joined batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.errors import TrainingError

Batch = Mapping[str, Any]
Collate = Callable[[list[Batch]], Batch]


class Entries(list[Any]):
    """A list with an entry for each row."""


def count_of(batch: Any, name: str) -> int:
    """Returns the number of rows of a batch: the length of its first tensor.

    Raises:
        TrainingError: the batch is not a mapping of names to tensors, or its tensors differ in length.
    """
    if not isinstance(batch, Mapping):
        raise TrainingError(
            f"a batch of {name!r} is a {type(batch).__name__}; pass a mapping of names to tensors, as the model takes "
            "it, including labels"
        )
    lengths = {key: len(each) for key, each in batch.items() if isinstance(each, Tensor) and each.dim()}
    if not lengths or len({*lengths.values()}) > 1 or not max(lengths.values()):
        raise TrainingError(f"the tensors of a batch of {name!r} have no common number of rows: {lengths}")
    return next(iter(lengths.values()))


def together(batches: Mapping[str, Batch], pad: Mapping[str, float], collate: Collate | None) -> dict[str, Any]:
    """Returns one batch with the rows of all given batches, in order.

    Args:
        batches: the batches by name of the adapter.
        pad: padding values by name of the tensor. A tensor is padded at the end of each dimension in which tensors of
            other batches are longer.
        collate: a function that joins a list of batches into one; None to pad and concatenate.

    Raises:
        TrainingError: the batches differ in names, shapes, or values that do not belong to rows; or the collate
            function returned another number of rows.
    """
    counts = {name: count_of(batch, name) for name, batch in batches.items()}
    if collate is not None:
        made = dict(collate([*batches.values()]))
        if count_of(made, "all members (made by the collate function)") != sum(counts.values()):
            raise TrainingError(
                f"the collate function of the fleet returned {count_of(made, '')} rows for {sum(counts.values())}; it "
                "has to keep every row, in order"
            )
        rows = sum(counts.values())
        return {key: Entries(each) if type(each) is list and len(each) == rows else each for key, each in made.items()}
    names = [*batches]
    first = batches[names[0]]
    for name in names[1:]:
        if batches[name].keys() != first.keys():
            raise TrainingError(
                f"batches of {names[0]!r} have {', '.join(first)}, but those of {name!r} have "
                f"{', '.join(batches[name])}; use the same names for all members (a mask of ones, for instance), or "
                "pass Fleet(..., collate=...)"
            )
    return {key: _column(key, {name: batches[name][key] for name in names}, counts, pad) for key in first}


def _column(key: str, values: Mapping[str, Any], counts: Mapping[str, int], pad: Mapping[str, float]) -> Any:
    """Returns the values that all batches have under one name, joined into one value."""
    each = [*values.values()]
    if all(isinstance(value, Tensor) and value.dim() for value in each):
        return _tensors(key, values, pad)
    by_row = all(isinstance(value, list | tuple) and len(value) == counts[name] for name, value in values.items())
    if by_row:
        return Entries(entry for value in each for entry in value)
    if all(_same(value, each[0]) for value in each[1:]):
        return each[0]
    raise TrainingError(
        f"{key!r} is neither a tensor nor a list with an entry for each row, and differs between {', '.join(values)}; "
        "train these adapters in separate fleets"
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


def _tensors(key: str, values: Mapping[str, Tensor], pad: Mapping[str, float]) -> Tensor:
    each = [*values.values()]
    shapes = {name: tuple(value.shape[1:]) for name, value in values.items()}
    if len({value.dim() for value in each}) > 1 or len({value.dtype for value in each}) > 1:
        raise TrainingError(
            f"{key!r} has different numbers of dimensions, or different dtypes, in some batches: {shapes}"
        )
    if len(set(shapes.values())) > 1:
        if key not in pad:
            raise TrainingError(
                f"{key!r} has rows of different shapes: {shapes}. Pass the value for padding, Fleet(model, "
                f"pad={{{key!r}: ...}}) (with a mask that ignores it), or combine the batches yourself with collate=..."
            )
        longest = [max(sizes) for sizes in zip(*shapes.values(), strict=True)]
        each = [_filled(value, longest, pad[key]) for value in each]
    return torch.cat(each)


def _filled(value: Tensor, sizes: Sequence[int], fill: float) -> Tensor:
    lacking = [wanted - held for wanted, held in zip(sizes, value.shape[1:], strict=True)]
    widths = [width for each in reversed(lacking) for width in (0, each)]
    return F.pad(value, widths, value=fill) if any(widths) else value


def taken(batch: Batch, rows: list[int]) -> dict[str, Any]:
    """Returns some rows of a batch that `together` made: rows are selected in its tensors (along the first dimension)
    and in its lists with an entry for each row. Other values are returned unchanged."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            return value[torch.tensor(rows, device=value.device)]
        return Entries(value[row] for row in rows) if isinstance(value, Entries) else value

    return {key: of(value) for key, value in batch.items()}


def filled_in_front(own: Batch, made: Batch) -> bool:
    """Whether the joined batch `made` has padding in front of the rows of the batch `own`. Tensors with the same name
    are compared."""
    for key, value in own.items():
        rows = made.get(key)
        if isinstance(value, Tensor) and isinstance(rows, Tensor) and value.dim() == rows.dim() > 1:
            common = tuple(slice(min(sizes)) for sizes in zip(value.shape, rows.shape, strict=True))
            if not torch.equal(rows[common], value.to(rows)[common]):
                return True
    return False
