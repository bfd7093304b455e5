"""One adapter that trains in a fleet: its data, its loss, its optimizer, and its progress."""

from __future__ import annotations

import inspect
import logging
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils._pytree import tree_map_only

from peftcore.errors import CheckpointError, RouteError, TrainingError
from peftcore.files.continuing import check_record, differences, listed, record_of
from peftcore.fleets import adapter_checkpoints
from peftcore.fleets.feeds import Data, Feed
from peftcore.fleets.losses import Loss
from peftcore.injection.injection import Injection
from peftcore.layers.pieces import whole
from peftcore.training.optimizer import (
    MethodOptimizer,
    check_steps,
    cut_state,
    gradient_rules,
    scheduled,
    take_steps,
    transient,
    whole_state,
    whole_step,
)

logger = logging.getLogger("peftcore")

VERSION = 2
"""The version of the state in a checkpoint."""


class Member:
    """One adapter in a fleet. `Fleet.join` makes it.

    Attributes:
        name: the injection's name.
        injection: the injection.
        optimizer: the optimizer of its parameters.
        schedule: its schedule of learning rates, or None.
        steps: the number of steps that it will take; None for one epoch.
        step: the number of steps taken.
        losses: the loss of each step; the mean over processes if several processes train together.
        tokens: the total number of items over which its losses were averaged: labels that count, or rows.
        forwards: the number of forwards of the base in which it took part.
        done: whether it has stopped training.
        ended: why it has stopped; empty as long as it trains. The reason is not stored in checkpoints: after a resume,
            its steps, its data and `stop` decide again whether it continues.
        failed: whether it has stopped because its loss was not finite.
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
        self.failed = False
        self.training = uuid.uuid4().hex
        """The identity of this training; it marks the folders of its checkpoints."""
        self._ended = ""
        self._saved: int | None = None
        """The step of its last checkpoint in its folder."""
        self._asked = 0
        """The last step after which `stop` was called."""
        self._fed = (0, 0)
        """Epoch and position in the data after its last step."""
        self.of_tokens = False
        """Whether its loss is the model's own loss, a mean over tokens."""
        self._window: list[Mapping[str, Any]] = []
        self._check()
        self._stepped = [] if self._owns_steps else [*scheduled(injection)]
        self._given = self._options()
        if isinstance(optimizer, MethodOptimizer) and optimizer.total_steps is None:
            optimizer.total_steps = steps

    @property
    def ended(self) -> str:
        if not self._ended and self.steps is not None and self.step >= self.steps:
            return "all steps are taken"
        return self._ended

    @property
    def done(self) -> bool:
        return bool(self.ended)

    @property
    def loss(self) -> float | None:
        """The loss of its last step; None before the first step."""
        return self.losses[-1] if self.losses else None

    @property
    def _owns_steps(self) -> bool:
        return isinstance(self.optimizer, MethodOptimizer) and self.optimizer.injection is self.injection

    @property
    def _inner(self) -> Optimizer:
        """The torch optimizer that takes the steps."""
        return self.optimizer.inner if isinstance(self.optimizer, MethodOptimizer) else self.optimizer

    def _options(self) -> dict[str, Any]:
        """Returns the options of the optimizer and the schedule. It is called before their first step."""
        schedule = None if self.schedule is None else {"kind": _kind(self.schedule), **self.schedule.state_dict()}
        told: dict[str, Any] = tree_map_only(Tensor, Tensor.tolist, {"optimizer": self._groups(), "schedule": schedule})
        return told

    def _groups(self) -> list[dict[str, Any]]:
        """Returns the options of the optimizer's groups of parameters."""
        return [{key: each for key, each in group.items() if key != "params"} for group in self.optimizer.param_groups]

    def _total_steps(self) -> int | None:
        """Returns the number of steps of the method's schedule: `total_steps` of the optimizer, or the member's steps
        if that is None."""
        told = self.optimizer.total_steps if isinstance(self.optimizer, MethodOptimizer) else None
        return self.steps if told is None else told

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that its optimizer trains."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _check(self) -> None:
        """Check that the adapter can train in a fleet with these arguments.

        Raises:
            RouteError: rows of the batch cannot be distinguished at its sites.
            TrainingError: the adapter is frozen or merged, the optimizer does not train exactly its parameters, or a
                number is out of range.
        """
        injection, name = self.injection, self.name
        try:
            injection.check_routable()
        except RouteError as error:
            raise RouteError(
                f"{name!r} cannot train in a fleet ({error}). Train it alone: with injection.optimizer(...) in a loop, "
                "or with peftcore.training.PeftcoreTrainer"
            ) from None
        if injection.merged:
            raise TrainingError(f"{name!r} is merged into the base, which all members share: unmerge() it first")
        trained = {id(each) for each in injection.parameters() if each.requires_grad}
        if not trained:
            raise TrainingError(f"nothing trains: {name!r} is frozen, as `load` leaves it; call injection.trainable()")
        given = {id(each) for each in self.parameters()}
        if trained != given:
            raise TrainingError(
                f"the optimizer of {name!r} must train exactly its {len(trained)} trainable parameters, but has "
                f"{len(given)} parameters, {len(given & trained)} of them among these: make it with "
                "injection.optimizer(torch.optim.AdamW, lr=...) after the model was wrapped or sharded"
            )
        self._check_arguments()
        if gradient_rules(injection) and not self._owns_steps:
            raise TrainingError(
                f"{name!r} has a gradient rule that this optimizer does not apply: pass "
                "optimizer=injection.optimizer(torch.optim.AdamW, lr=...)"
            )
        if any(True for _ in scheduled(injection)):
            if (total := self._total_steps()) is None or self.steps is None:
                raise TrainingError(
                    f"{injection.method.name} changes with the steps: pass their number, join(..., steps=N)"
                )
            check_steps(injection, total)
        wrong = {"steps": self.steps, "accumulate": self.accumulate, "save_every": self.save_every}
        for what, number in wrong.items():
            if number is not None and number < 1:
                raise TrainingError(f"{what}={number} of {name!r}: has to be 1 or more")
        if self.clip is not None and not self.clip > 0:
            raise TrainingError(
                f"clip={self.clip} of {name!r}: has to be above 0; it is the largest norm of all gradients together"
            )
        if self.save_every is not None and self.folder is None:
            raise TrainingError(f"save_every of {name!r} needs folder=..., the folder for its checkpoints")

    def _check_arguments(self) -> None:
        """Check that the optimizer and the schedule can take a step with the arguments that a fleet passes.

        Raises:
            TrainingError: they need other arguments, or the schedule belongs to another optimizer.
        """
        if _needs_arguments(self._inner):
            raise TrainingError(
                f"{type(self._inner).__name__} of {self.name!r} computes the loss several times in one step, but a "
                "fleet computes it once for all members: use an optimizer that needs only gradients, such as "
                "torch.optim.AdamW, or train the adapter alone, in a loop"
            )
        schedule = self.schedule
        if schedule is None:
            return
        if not isinstance(schedule, ReduceLROnPlateau) and _needs_arguments(schedule):
            raise TrainingError(
                f"{type(schedule).__name__}.step of {self.name!r} needs arguments, but a fleet calls schedule.step() "
                "without any (only ReduceLROnPlateau.step gets the loss of the step): give the argument a default"
            )
        if isinstance(schedule, LRScheduler) and schedule.optimizer not in (self.optimizer, self._inner):
            raise TrainingError(
                f"the schedule of {self.name!r} changes the learning rates of another optimizer: create it with the "
                "optimizer that you pass to join"
            )

    def check_trains(self) -> None:
        """Check that some of its parameters still train.

        Raises:
            TrainingError: the adapter was frozen after it joined.
        """
        if not any(each.requires_grad for each in self.parameters()):
            raise TrainingError(
                f"{self.name!r} was frozen after it joined, so its steps would train nothing: call "
                f"injection.trainable(True), or remove it with fleet.leave({self.name!r})"
            )

    def window(self) -> list[Mapping[str, Any]]:
        """Returns the batches of the member's next step. After a failed step, these are the same batches again. The
        list is empty if the member is done."""
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
        logger.warning("%r in a fleet: %s; pass data that can be iterated again", self.name, self.ended)

    def zero(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def take_step(self, loss: float, tokens: int) -> None:
        """Clip the gradients, then take a step of the optimizer, the method and the schedule. If one of them raises an
        error, the states of all three are restored."""
        with whole_step(self.injection, self.optimizer, self.schedule):
            if self.clip is not None:
                clip_gradients(self.parameters(), self.clip)
            self.optimizer.step()
            if self._stepped:
                assert self.steps is not None
                take_steps(self._stepped, self.step + 1, self.steps)
            self._step_schedule(loss)
        self.step += 1
        self.losses.append(loss)
        self.tokens += tokens
        self._fed = self.feed.epoch, self.feed.position
        self._window = []
        self.zero()

    def _step_schedule(self, loss: float) -> None:
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(loss)
        elif self.schedule is not None:
            self.schedule.step()

    def settle(self) -> None:
        """Do the work after a step: call `stop`, and write a checkpoint if one is due. Work that was already done for
        this step is skipped. An action that raised an error is repeated in the next call.
        """
        try:
            if not self.done and self._asked != self.step and self.stop is not None and self.stop(self):
                self._end("stopped early")
            self._asked = self.step
        finally:
            due = self.done or (self.save_every is not None and self.step and self.step % self.save_every == 0)
            if self.folder is not None and due and self._saved != self.step:
                self.save()

    def fail(self, loss: float) -> None:
        """End the member because its loss is not finite; its parameters keep the values of the step before."""
        self._window = []
        self.zero()
        self.failed = True
        self._end(
            f"the loss became {loss} in step {self.step + 1}: try a smaller learning rate or a longer warm-up; its "
            "values are those of the step before"
        )
        logger.warning("%r in a fleet: %s", self.name, self.ended)

    def _end(self, why: str) -> None:
        self._ended = why

    def end(self, why: str) -> None:
        """End the member between two steps."""
        if not self.done:
            self._end(why)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path | None = None) -> Path:
        """Write a checkpoint from which the training can continue exactly. Earlier checkpoints in the folder are
        removed.

        Args:
            folder: the folder for the checkpoint; by default the folder given to `Fleet.join`.

        Returns:
            The folder of this checkpoint, which `peftcore.load` reads too.

        Raises:
            TrainingError: no folder was passed here or to `Fleet.join`, or the state of the optimizer or schedule is
                not plain data.
        """
        place = folder or self.folder
        if place is None:
            raise TrainingError(f"{self.name!r} has no folder: pass join(..., folder=...), or save(folder)")
        with whole_state(self.optimizer):
            state = {
                "version": VERSION,
                "adapter": record_of(self.injection),
                "training": self._decides(),
                "given": self._given,
                "step": self.step,
                "tokens": self.tokens,
                "forwards": self.forwards,
                "losses": self.losses,
                "fed": self._fed,
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "buffers": dict(transient(self.injection)),
            }
            written = adapter_checkpoints.write(self.injection, state, place, self.step, self.training)
        if place == self.folder:
            self._saved = self.step
        return written

    def _decides(self) -> dict[str, Any]:
        """Returns the settings that must be the same when the training is resumed, in addition to the adapter."""
        follows = any(True for _ in scheduled(self.injection))
        total = self._total_steps() if follows else None  # a schedule of the method is one over all steps
        return {"seed": self.seed, "optimizer": _kind(self._inner), "steps of the method's schedule": total}

    def resume(self) -> None:
        """Continue from the newest checkpoint in the member's folder. Without a checkpoint, nothing changes.

        The states of the adapter, the optimizer and the schedule are read from the checkpoint. The options (steps,
        learning rates, the length of the schedule) are not read: the current ones are used. If they differ from those
        of the checkpoint, the schedule is advanced through the steps that were taken.

        Raises:
            CheckpointError: the checkpoint is damaged, or belongs to another adapter, base, optimizer or seed; nothing
                was changed.
        """
        place = None if self.folder is None else adapter_checkpoints.newest(self.folder)
        if place is None:
            return
        state = adapter_checkpoints.read(place)
        if state.get("version") != VERSION:
            raise CheckpointError(
                f"{place} was written by another version of fleets: begin a new training from its values, "
                f"peftcore.load(model, {str(place)!r}, trainable=True)"
            )
        check_record(state["adapter"], self.injection, place)
        if other := differences(state["training"], self._decides()):
            raise CheckpointError(
                f"{place} belongs to another training: {listed(other)}; join with the same options, or begin a new "
                f"training from its values, peftcore.load(model, {str(place)!r}, trainable=True)"
            )
        values, buffers = adapter_checkpoints.values_of(self.injection, place), dict(transient(self.injection))
        if buffers.keys() != state["buffers"].keys():
            raise CheckpointError(
                f"{place} lacks the state of the method between steps; apply the adapter with the options it was "
                "trained with"
            )
        self.feed.go_to(*state["fed"])
        changed = differences(state["given"], self._given)
        options = self._options_after(state["losses"], place) if changed else []
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{place} was written with another optimizer: {error}. Join with an optimizer of the same kind"
            ) from None
        cut_state(self.optimizer)
        if changed:
            logger.warning("%r in a fleet goes on with other options: %s", self.name, listed(changed))
            for group, told in zip(self.optimizer.param_groups, options, strict=True):
                group.update(told)
        elif self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        adapter_checkpoints.put(self.injection, values)
        for name, buffer in buffers.items():
            buffer.copy_(state["buffers"][name])
        self.step, self.tokens, self.forwards = state["step"], state["tokens"], state["forwards"]
        self.losses, self._fed, self._saved = list(state["losses"]), state["fed"], self.step
        self._asked = self.step
        if self.step and self.stop is not None and self.stop(self):
            self._end("stopped early")

    def _options_after(self, losses: list[float], place: Path) -> list[dict[str, Any]]:
        """Advance the schedule through the steps that were taken, and return the resulting options of the optimizer's
        groups.

        Raises:
            CheckpointError: the schedule has fewer steps.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch misses the optimizer's steps
                for loss in losses:
                    self._step_schedule(loss)
        except Exception as error:
            raise CheckpointError(
                f"the schedule cannot be advanced through the {len(losses)} steps of {place}: {error}. Pass a schedule "
                "with at least so many steps"
            ) from error
        return self._groups()

    def __repr__(self) -> str:
        of = "" if self.steps is None else f" of {self.steps}"
        loss = "" if self.loss is None else f", loss {self.loss:.4g}"
        return f"Member({self.name!r}: step {self.step}{of}{loss}{f', {self.ended}' if self.done else ''})"


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Clip the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_` does. This also works if only some
    gradients are sharded. Returns the norm before clipping."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    norms = [whole(torch.linalg.vector_norm(each)) for each in gradients]
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
    factor = (largest / (total + 1e-6)).clamp(max=1.0)
    for each in gradients:
        each.mul_(factor.to(each.device, each.dtype))
    return total


def _kind(what: object) -> str:
    """Returns the full name of an object's class, which a checkpoint stores for comparison."""
    return f"{type(what).__module__}.{type(what).__qualname__}"


def _needs_arguments(stepping: Any) -> bool:
    """Whether `step` of an optimizer or a schedule has required arguments."""
    step = type(stepping).step  # torch replaces the one of an optimizer that has a schedule
    try:
        inspect.signature(step).bind(stepping)
    except TypeError:
        return True
    return False
