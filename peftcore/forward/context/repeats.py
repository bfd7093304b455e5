"""How many times a batch repeats the entries of a value that the user passes to `peftcore.call` (such as the images of
a UNet or the tasks of the rows).

A value has one entry for each row of the batch, or one for all. If the batch has more rows than the value has entries,
there are two possibilities, which cannot be distinguished from the batch. Pipelines with classifier-free guidance
concatenate all rows without the text and all rows with it. Beams, or several images of a prompt, are adjacent rows. So
the user specifies the repetition in `peftcore.call`, or it is that of the running ``generate`` or route.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from peftcore.errors import ConfigError, RouteError

GUIDANCE, COPIES = "guidance", "copies"


class Repeats(NamedTuple):
    """How many times a batch repeats each entry. Each entry has `copies` adjacent rows, and the resulting sequence of
    rows occurs `guidance` times."""

    guidance: int = 1
    copies: int = 1

    def of(self, value: Tensor) -> Tensor:
        """Returns a value whose entries are repeated like the rows of the batch."""
        each = value if self.copies == 1 else value.repeat_interleave(self.copies, 0)
        return each if self.guidance == 1 else each.repeat(self.guidance, *[1] * (value.dim() - 1))


def told_repeats(context: Mapping[str, Any]) -> Repeats | None:
    """Returns how many times a batch repeats each entry, if the user specified it in `peftcore.call`; otherwise None.

    Args:
        context: the values given to `peftcore.call`, of which `guidance` and `copies` are read.

    Raises:
        ConfigError: one of the two values is not a positive integer.
    """
    guidance, copies = context.get(GUIDANCE), context.get(COPIES)
    if guidance is None and copies is None:
        return None
    guidance = 2 if guidance is True else 1 if guidance is None or guidance is False else guidance
    copies = 1 if copies is None else copies
    for name, times in ((GUIDANCE, guidance), (COPIES, copies)):
        if isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise ConfigError(f"{name}={times!r} is not a number of repetitions: pass an integer of 1 or more")
    return Repeats(guidance, copies)


def of_batch(name: str, value: Tensor, batch: int, repeats: Repeats) -> Tensor:
    """Returns the entries of a value, repeated if necessary, so that there is one per row of a batch.

    Args:
        name: the name of the value in `peftcore.call`.
        value: a tensor with one entry per row of the batch, or per row before repetition.
        batch: the number of rows of the batch.
        repeats: how many times the batch repeats each entry.

    Raises:
        RouteError: the number of rows does not match the entries.
    """
    if len(value) == batch:
        return value
    if len(value) * repeats.guidance * repeats.copies == batch:
        return repeats.of(value)
    raise RouteError(
        f"{name} has {len(value)} entries, but the batch has {batch} rows: pass one for each row, or one for all. If "
        f"the batch repeats the entries, use peftcore.call(model, {name}=..., guidance=True) where a pipeline puts "
        "rows without and with text into one batch, or copies=N where each entry has N adjacent rows "
        "(num_images_per_prompt, num_beams)"
    )
