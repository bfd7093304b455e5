"""Trainers: integrations with other libraries', and what users find in `peftcore.training`.

It may import `fleets`, and what is below. In the order of reading:

- `checkpoints`: what the Trainer of transformers writes of an adapted model.
- `beside`: what a checkpoint lacks that a Trainer writes in a way of its own.
- `callback`: the Trainer's callback.
- `trainer`: the Trainer itself, wherever its loss is computed.
- `per_example`: gradients of single examples, for differential privacy.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import what `peftcore.training` hands out, when it is first asked for."""
    if name in ("Fleet", "Member"):
        from peftcore.fleets import fleet, member

        return fleet.Fleet if name == "Fleet" else member.Member
    if name == "PeftcoreCallback":
        from peftcore.trainers.callback import PeftcoreCallback

        return PeftcoreCallback
    if name == "PeftcoreTrainer":
        from peftcore.trainers.trainer import PeftcoreTrainer

        return PeftcoreTrainer
    if name == "PerExample":
        from peftcore.trainers.per_example import PerExample

        return PerExample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
