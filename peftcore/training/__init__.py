"""Training: optimizers with a method's parameter groups, gradient rule and schedule, and calibration with data.

It may import `surgery` and the layers below; `Fleet`, `Member`, `PeftcoreTrainer`, `PeftcoreCallback` and `PerExample`
are in layers above, and are imported on demand. In the order of reading:

- `calibration`: the steps in which a method reads the user's data before training.
- `optimizer`: torch optimizers that apply a method's rules.
"""

from typing import TYPE_CHECKING, Any

from peftcore.contract.batches import Batch, Batches, Labelled
from peftcore.contract.method import GradientRule
from peftcore.training.optimizer import MethodOptimizer

if TYPE_CHECKING:
    from peftcore.trainers import Fleet, Member, PeftcoreCallback, PeftcoreTrainer, PerExample

__all__ = [
    "Batch",
    "Batches",
    "Fleet",
    "GradientRule",
    "Labelled",
    "Member",
    "MethodOptimizer",
    "PeftcoreCallback",
    "PeftcoreTrainer",
    "PerExample",
]


def __getattr__(name: str) -> Any:
    """Returns a class of a layer above, imported at its first use, since some of these classes need transformers."""
    if name in ("Fleet", "Member", "PeftcoreCallback", "PeftcoreTrainer", "PerExample"):
        from peftcore import trainers

        return getattr(trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
