"""One adapter that trains in a fleet: its data, its loss, its optimizer, and what it has come to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from peftcore.errors import CheckpointError, RouteError, TrainingError
from peftcore.fleets import checkpoints
from peftcore.fleets.feeds import Data, Feed
from peftcore.fleets.losses import Loss
from peftcore.injection.injection import Injection
from peftcore.layers.pieces import whole
from peftcore.training.optimizer import (
    MethodOptimizer,
    cut_state,
    gradient_rules,
    scheduled,
    take_steps,
    transient,
    whole_state,
)

logger = logging.getLogger("peftcore")

VERSION = 1
"""The version of the state in a checkpoint."""


class Member:
    """One adapter in a fleet. `Fleet.join` makes it.

    Attributes:
        name: the injection's name.
        injection: the injection.
        optimizer: its optimizer.
        schedule: its schedule of learning rates, or None.
        steps: how many steps it is to take; None: one epoch.
        step: how many it has taken.
        losses: the loss of each of them; where processes share the training, the mean of theirs.
        tokens: how much its losses were means over: labels that count, or rows.
        forwards: how many forwards of the base it took part in.
        done: whether it trains no more.
        ended: why not; empty as long as it trains.
        failed: whether that is because its loss was no number.
    """

    def __init__(
        self,
        injection: Injection,
        data: Data,
        loss: Loss,
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        steps: int | None,
        clip: float | None,
        accumulate: int,
        seed: int,
        stop: Callable[[Member], bool] | None,
        folder: Path | None,
        save_every: int | None,
    ) -> None:
        self.name, self.injection = injection.name, injection
        self.loss_function, self.optimizer, self.schedule = loss, optimizer, schedule
        self.steps, self.clip, self.accumulate, self.seed, self.stop = steps, clip, accumulate, seed, stop
        self.folder, self.save_every = folder, save_every
        self.feed = Feed(data, seed, once=steps is None)
        self.step = self.tokens = self.forwards = 0
        self.losses: list[float] = []
        self.ended, self.failed = "", False
        self.of_tokens = False
        """Whether its loss is the model's own, a mean over tokens."""
        self._window: list[Mapping[str, Any]] = []
        self._check()
        self._stepped = [] if self._owns_steps else [*scheduled(injection)]
        if isinstance(optimizer, MethodOptimizer) and optimizer.total_steps is None:
            optimizer.total_steps = steps

    @property
    def done(self) -> bool:
        return bool(self.ended)

    @property
    def loss(self) -> float | None:
        """The loss of its last step; None before the first."""
        return self.losses[-1] if self.losses else None

    @property
    def _owns_steps(self) -> bool:
        return isinstance(self.optimizer, MethodOptimizer) and self.optimizer.injection is self.injection

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that its optimizer trains."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _check(self) -> None:
        """Check that the adapter can train by itself among others, as its method says.

        Raises:
            RouteError: its rows cannot be told apart.
            TrainingError: it is frozen or merged, the optimizer is not one for it, or numbers make no sense.
        """
        injection, name = self.injection, self.name
        try:
            injection.check_routable()
        except RouteError as error:
            raise RouteError(
                f"{error}: {name!r} cannot train in a fleet. Train it by itself: with injection.optimizer(...) in a "
                "loop, or with peftcore.training.PeftcoreTrainer"
            ) from None
        if injection.merged:
            raise TrainingError(f"{name!r} is merged into the base, which all members share: unmerge() it first")
        trained = {id(each) for each in injection.parameters() if each.requires_grad}
        if not trained:
            raise TrainingError(f"nothing trains: {name!r} is frozen, as `load` leaves it; call injection.trainable()")
        given = {id(each) for each in self.parameters()}
        if trained != given:
            raise TrainingError(
                f"the optimizer of {name!r} is to have the {len(trained)} parameters of it that train and no others, "
                f"and has {len(given)}, {len(given & trained)} of them: injection.optimizer(torch.optim.AdamW, lr=...) "
                "makes one, after the model was wrapped or sharded"
            )
        if gradient_rules(injection) and not self._owns_steps:
            raise TrainingError(
                f"{name!r} has a rule for gradients that this optimizer does not know: "
                "optimizer=injection.optimizer(torch.optim.AdamW, lr=...)"
            )
        if any(True for _ in scheduled(injection)) and self.steps is None:
            raise TrainingError(f"{injection.method.name} changes with the steps: say how many, join(..., steps=N)")
        wrong = {"steps": self.steps, "accumulate": self.accumulate, "save_every": self.save_every}
        for what, number in wrong.items():
            if number is not None and number < 1:
                raise TrainingError(f"{what}={number} of {name!r}: has to be 1 or more")
        if self.clip is not None and not self.clip > 0:
            raise TrainingError(f"clip={self.clip} of {name!r}: has to be above 0, the largest norm of all gradients")
        if self.save_every is not None and self.folder is None:
            raise TrainingError(f"save_every of {name!r} needs folder=..., where checkpoints go")

    def window(self) -> list[Mapping[str, Any]]:
        """Returns the batches of its next step: those of the step that failed, if one did; none when it is done."""
        while not self.done and len(self._window) < self.accumulate:
            batch = self.feed.take()
            if batch is None:
                break
            self._window.append(batch)
        if not self.done and not self._window:
            self._end_with_data()
        return self._window

    def _end_with_data(self) -> None:
        if self.steps is None:
            self._end("its epoch is over")
            return
        self._end(f"its data ended after {self.step} of {self.steps} steps")
        logger.warning("%r in a fleet: %s; give data that can be gone through again", self.name, self.ended)

    def zero(self) -> None:
        """Forget gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def take_step(self, loss: float, tokens: int) -> None:
        """Clip the gradients that are there, and take a step of the optimizer, the method and the schedule."""
        if self.clip is not None:
            clip_gradients(self.parameters(), self.clip)
        self.optimizer.step()
        self.step += 1
        if self._stepped:
            assert self.steps is not None
            take_steps(self._stepped, self.step, self.steps)
        if self.schedule is not None:
            self.schedule.step()
        self._count(loss, tokens)
        if self.steps is not None and self.step >= self.steps:
            self._end("all steps are taken")
        elif self.stop is not None and self.stop(self):
            self._end("stopped early")
        if self.folder is not None and (self.done or (self.save_every and self.step % self.save_every == 0)):
            self.save()

    def fail(self, loss: float) -> None:
        """End it, since its loss is no number: it keeps the values of the step before."""
        self._window = []
        self.zero()
        self.failed = True
        self._end(
            f"the loss became {loss} in step {self.step + 1}: try a smaller learning rate or a longer warm-up; its "
            "values are those of the step before"
        )
        logger.warning("%r in a fleet: %s", self.name, self.ended)

    def _count(self, loss: float, tokens: int) -> None:
        self.losses.append(loss)
        self.tokens += tokens
        self._window = []
        self.zero()

    def _end(self, why: str) -> None:
        self.ended = why

    def end(self, why: str) -> None:
        """End it between two steps."""
        if not self.done:
            self._end(why)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path | None = None) -> Path:
        """Write a checkpoint, from which it goes on exactly; those before it in the folder go.

        Args:
            folder: where; that of `Fleet.join` by default.

        Returns:
            The folder of this checkpoint, which `peftcore.load` reads too.

        Raises:
            TrainingError: there is no folder, or an optimizer or schedule whose state is no plain data.
        """
        place = folder or self.folder
        if place is None:
            raise TrainingError(f"{self.name!r} has no folder: join(..., folder=...), or save(folder)")
        with whole_state(self.optimizer):
            optimizer = self.optimizer.state_dict()
            state = {
                "version": VERSION,
                "method": self.injection.method.name,
                "seed": self.seed,
                "step": self.step,
                "tokens": self.tokens,
                "forwards": self.forwards,
                "losses": self.losses,
                "ended": self.ended,
                "failed": self.failed,
                "epoch": self.feed.epoch,
                "position": self.feed.position,
                "optimizer": optimizer,
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "buffers": dict(transient(self.injection)),
            }
            return checkpoints.write(self.injection, state, place, self.step)

    def resume(self) -> None:
        """Go on from the newest checkpoint in the folder; where there is none, nothing changes.

        Raises:
            CheckpointError: it is damaged, or one of another adapter, optimizer or seed; nothing was changed.
        """
        place = None if self.folder is None else checkpoints.newest(self.folder)
        if place is None:
            return
        state = checkpoints.read(place)
        told = (state.get("version"), state.get("method"), state.get("seed"))
        wanted = (VERSION, self.injection.method.name, self.seed)
        if told != wanted:
            raise CheckpointError(f"{place} is of another training: version, method, seed are {told}, and not {wanted}")
        if (state["schedule"] is None) != (self.schedule is None):
            raise CheckpointError(f"{place} was written with {'no' if self.schedule else 'a'} schedule; do as then")
        values, buffers = checkpoints.values_of(self.injection, place), dict(transient(self.injection))
        if buffers.keys() != state["buffers"].keys():
            raise CheckpointError(f"{place} lacks the state of the method between steps; apply it as it was then")
        self.feed.go_to(state["epoch"], state["position"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{place} was written with another optimizer: {error}") from None
        cut_state(self.optimizer)
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        checkpoints.put(self.injection, values)
        for name, buffer in buffers.items():
            buffer.copy_(state["buffers"][name])
        self.step, self.tokens, self.forwards = state["step"], state["tokens"], state["forwards"]
        self.losses, self.ended, self.failed = list(state["losses"]), state["ended"], state["failed"]

    def __repr__(self) -> str:
        of = "" if self.steps is None else f" of {self.steps}"
        loss = "" if self.loss is None else f", loss {self.loss:.4g}"
        return f"Member({self.name!r}: step {self.step}{of}{loss}{f', {self.ended}' if self.done else ''})"


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients down to a norm of all of them together, as `torch.nn.utils.clip_grad_norm_` does, also where some
    are sharded and others not; returns the norm before."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    norms = [whole(torch.linalg.vector_norm(each)) for each in gradients]
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
    factor = (largest / (total + 1e-6)).clamp(max=1.0)
    for each in gradients:
        each.mul_(factor.to(each.device, each.dtype))
    return total
