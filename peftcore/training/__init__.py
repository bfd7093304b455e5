"""Training: optimizers with a method's parameter groups, gradient rule and schedule, and data before training.

It may import `surgery`, and what is below; the Trainer's callback, which is above, is handed out on demand. In the
order of reading:

- `batches`: the user's data, as a method sees it before training.
- `optimizer`: a torch optimizer with a method's rules.
"""

from typing import TYPE_CHECKING, Any

from peftcore.training.batches import Batch, Batches
from peftcore.training.optimizer import GradientRule, MethodOptimizer

if TYPE_CHECKING:
    from peftcore.trainers.callback import PeftcoreCallback

__all__ = ["Batch", "Batches", "GradientRule", "MethodOptimizer", "PeftcoreCallback"]


def __getattr__(name: str) -> Any:
    """Import the callback when it is first asked for: it is a subclass of one of transformers."""
    if name == "PeftcoreCallback":
        from peftcore.trainers.callback import PeftcoreCallback

        return PeftcoreCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
