"""How a batch repeats the entries of a value given to `peftcore.call` (images of a UNet, tasks, lengths of prompts).

A value has one entry for each row of the batch, or one for all. A batch with more rows than entries repeats them in one
of two ways, which cannot be read from the batch: pipelines with classifier-free guidance concatenate all rows without
the text and all rows with it, while beams or several images of a prompt are adjacent rows. So the call specifies the
repetition, or it follows from the ``generate`` or the route in which the forward runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from peftcore.errors import ConfigError, RouteError

GUIDANCE, COPIES = "guidance", "copies"


class Repeats(NamedTuple):
    """The repetition of entries in a batch: each entry has `copies` adjacent rows, and this sequence occurs `guidance`
    times."""

    guidance: int = 1
    copies: int = 1

    def of(self, value: Tensor) -> Tensor:
        """Returns the entries of a value, repeated as in the rows of the batch."""
        each = value if self.copies == 1 else value.repeat_interleave(self.copies, 0)
        return each if self.guidance == 1 else each.repeat(self.guidance, *[1] * (value.dim() - 1))


def told_repeats(context: Mapping[str, Any]) -> Repeats | None:
    """Returns the repetition that a call specifies; None if it specifies none.

    Raises:
        ConfigError: a value is not a positive integer.
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
    """Returns the entries of a value for each row of a batch: unchanged if there is one for each row.

    Args:
        name: the name of the value in `peftcore.call`.
        value: an entry for each row of the batch, or for each row before repetition.
        batch: the number of rows of the batch.
        repeats: the repetition of entries in the batch.

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
