"""How a batch repeats the entries of a value that a call tells: pictures of a UNet, tasks, lengths of prompts.

A value has one entry for each row of the batch, or one for all. Where a batch has more rows than there are entries, it
repeats them in one of two ways, and nothing in it says which: pipelines with classifier-free guidance put all rows
behind themselves, without and with the text, and beams or several images of a prompt stand next to each other. So it is
told, or known from the ``generate`` or the route in which the forward runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from peftcore.errors import ConfigError, RouteError

GUIDANCE, COPIES = "guidance", "copies"


class Repeats(NamedTuple):
    """The rows of a batch, in the order of the entries that they belong to: the whole `guidance` times, in which each
    entry has `copies` adjacent rows."""

    guidance: int = 1
    copies: int = 1

    def of(self, value: Tensor) -> Tensor:
        """Returns the entries of a value as the rows of the batch repeat them."""
        each = value if self.copies == 1 else value.repeat_interleave(self.copies, 0)
        return each if self.guidance == 1 else each.repeat(self.guidance, *[1] * (value.dim() - 1))


def told_repeats(context: Mapping[str, Any]) -> Repeats | None:
    """Returns what a call says of how the batch repeats entries; None where it says nothing.

    Raises:
        ConfigError: it is no number of times.
    """
    guidance, copies = context.get(GUIDANCE), context.get(COPIES)
    if guidance is None and copies is None:
        return None
    guidance = 2 if guidance is True else 1 if guidance is None or guidance is False else guidance
    copies = 1 if copies is None else copies
    for name, times in ((GUIDANCE, guidance), (COPIES, copies)):
        if isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise ConfigError(f"{name}={times!r} says not how often the batch repeats entries: give 1 or more")
    return Repeats(guidance, copies)


def of_batch(name: str, value: Tensor, batch: int, repeats: Repeats) -> Tensor:
    """Returns the entries of a value for each row of a batch: as they are where there are as many.

    Args:
        name: the name by which a call tells the value.
        value: an entry for each row, or for each of those that the batch repeats.
        batch: how many rows it has.
        repeats: how it repeats entries.

    Raises:
        RouteError: there are not as many rows.
    """
    if len(value) == batch:
        return value
    if len(value) * repeats.guidance * repeats.copies == batch:
        return repeats.of(value)
    raise RouteError(
        f"{name} has {len(value)} entries, and the batch {batch} rows: give one for each row, or one for all; or say "
        f"how the batch repeats them: peftcore.call(model, {name}=..., guidance=True) where a pipeline puts rows "
        "without and with text into one batch, copies=N where each has N adjacent rows (num_images_per_prompt, "
        "num_beams)"
    )
