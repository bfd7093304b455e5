"""Training: optimizers with a method's rules and schedule, a look at data beforehand, and the Trainer's callback."""

from typing import TYPE_CHECKING, Any

from peftcore.training.batches import Batch, Batches
from peftcore.training.optimizer import GradientRule, MethodOptimizer

if TYPE_CHECKING:
    from peftcore.trainers.callback import PeftcoreCallback

__all__ = ["Batch", "Batches", "GradientRule", "MethodOptimizer", "PeftcoreCallback"]


def __getattr__(name: str) -> Any:
    """The callback is a class of transformers', which is imported when the callback is first asked for."""
    if name == "PeftcoreCallback":
        from peftcore.trainers.callback import PeftcoreCallback

        return PeftcoreCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
