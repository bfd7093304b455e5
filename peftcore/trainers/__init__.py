"""Integrations with the trainers of other libraries. Users import them from `peftcore.training`.

It may import `fleets` and the layers below. In the order of reading:

- `trainer_checkpoints`: the files that the Trainer of transformers writes for an adapted model.
- `custom_checkpoints`: tensors that are missing in the checkpoints of Trainers that save the model in a custom way.
- `callback`: the Trainer's callback.
- `trainer`: `PeftcoreTrainer`, which adds the losses of methods if the Trainer does not use the model's loss.
- `per_example`: gradients of single examples, for differential privacy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftcore.fleets.fleet import Fleet as Fleet
    from peftcore.fleets.member import Member as Member
    from peftcore.trainers.callback import PeftcoreCallback as PeftcoreCallback
    from peftcore.trainers.per_example import PerExample as PerExample
    from peftcore.trainers.trainer import PeftcoreTrainer as PeftcoreTrainer


def __getattr__(name: str) -> Any:
    """Returns a class that `peftcore.training` exports, imported at its first use."""
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
