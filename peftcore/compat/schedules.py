"""Detects schedules of methods that are not advanced during training. The optimizer's steps are counted for adapters
with a schedule. If the schedule was not advanced after a step, the next forward in training raises an error.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from peftcore.errors import TrainingError
from peftcore.injection.injection import Injection
from peftcore.training.optimizer import scheduled


@dataclass
class _Watch:
    """Two counts for an adapter: the steps by which its schedule was advanced (`told`), and the optimizer's steps since
    then (`untold`)."""

    told: int
    untold: int = 0

    def update(self, injection: Injection) -> None:
        """Reset `untold` if the schedule was advanced."""
        if (now := _told(injection)) != self.told:
            self.told, self.untold = now, 0


_WATCHED: weakref.WeakKeyDictionary[Injection, _Watch] = weakref.WeakKeyDictionary()


def has_schedule(injection: Injection) -> bool:
    """True if the method, or one of its parts, has a schedule that depends on the training steps."""
    return any(True for _ in scheduled(injection))


def check_driven(injection: Injection) -> None:
    """Check before a forward in training that the schedule was advanced after the optimizer's last step. Steps are
    counted from the first call on.

    Raises:
        TrainingError: the schedule was not advanced.
    """
    if not has_schedule(injection):
        return
    if not _WATCHED:
        _register()
    watch = _WATCHED.setdefault(injection, _Watch(_told(injection)))
    watch.update(injection)
    if watch.untold:
        raise TrainingError(
            f"{injection.method.name} has a schedule, but an optimizer stepped without advancing it: pass "
            "the Trainer callbacks=[peftcore.training.PeftcoreCallback()], or train with "
            "model.adapters[name].optimizer(..., total_steps=N)"
        )


def _told(injection: Injection) -> int:
    return sum(each.steps_taken for each in scheduled(injection))


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    """Count a step for each adapter that has parameters in an optimizer. If one optimizer wraps another, the hook is
    called for both."""
    if not _WATCHED:
        return
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for injection, watch in list(_WATCHED.items()):
        if any(id(each) in held for each in injection.parameters()):
            told = watch.told
            watch.update(injection)
            watch.untold += watch.told == told


_registered = False


def _register() -> None:
    """Register `_stepped` as a hook of all optimizers, once in a process."""
    global _registered
    if not _registered:
        register_optimizer_step_post_hook(_stepped)
        _registered = True
