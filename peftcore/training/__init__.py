"""Training: optimizers with a method's parameter groups, gradient rule and schedule, and data before training.

It may import `surgery`, and what is below; the Trainer and its callback, which are above, are handed out on demand. In
the order of reading:

- `batches`: the user's data, as a method sees it before training.
- `optimizer`: a torch optimizer with a method's rules.
"""

from typing import TYPE_CHECKING, Any

from peftcore.training.batches import Batch, Batches
from peftcore.training.optimizer import GradientRule, MethodOptimizer

if TYPE_CHECKING:
    from peftcore.trainers.callback import PeftcoreCallback
    from peftcore.trainers.trainer import PeftcoreTrainer

__all__ = ["Batch", "Batches", "GradientRule", "MethodOptimizer", "PeftcoreCallback", "PeftcoreTrainer"]


def __getattr__(name: str) -> Any:
    """Import the Trainer and its callback when they are first asked for: their base classes are of transformers."""
    if name == "PeftcoreCallback":
        from peftcore.trainers.callback import PeftcoreCallback

        return PeftcoreCallback
    if name == "PeftcoreTrainer":
        from peftcore.trainers.trainer import PeftcoreTrainer

        return PeftcoreTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
