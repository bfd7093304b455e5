"""The callback for training an adapted model with transformers' ``Trainer``: small checkpoints, exact resuming, and the
method's schedule.

    injection = peftcore.apply(model, "adalora")
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-3)
    trainer = Trainer(model, args, ..., optimizers=(optimizer, None), callbacks=[PeftcoreCallback()])

Omit ``optimizers`` for methods that need no special optimizer; the callback raises an error if one is needed. Models
that transformers has quantized can be trained in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftcore.contract.installed_methods import AppliedMethod
from peftcore.errors import TrainingError
from peftcore.injection.injection import Injection
from peftcore.layers.fsdp import is_sharded
from peftcore.libraries.admission import Admitted, await_trainer, has_trainer
from peftcore.libraries.instance_methods import give_methods_back, replace_methods
from peftcore.trainers.custom_checkpoints import of_run, read_beside, save_beside
from peftcore.trainers.trainer_checkpoints import (
    STATE,
    TransientBuffer,
    check_records,
    digest,
    frozen_keys,
    keys_of,
    records,
    save_adapters,
    save_for_trainer,
    state_between_steps,
    tell_run,
    training,
    within,
)
from peftcore.training.optimizer import MethodOptimizer, check_steps, gradient_rules, scheduled, take_steps
from peftcore.utils.journal import Journal


class PeftcoreCallback(transformers.TrainerCallback):
    """A callback for training a model that was adapted in place, with transformers' ``Trainer``.

    - Checkpoints contain the trained tensors and those of adapters, but not the frozen base. Training resumes exactly.
      If a Trainer saves models in a custom way (sentence-transformers), these tensors are stored in an extra file.
    - ``trainer.save_model(folder)`` saves the base without adapters, and the adapter in the same folder, from which
      `peftcore.load` reads it. Checkpoints and folders that are pushed to a hub contain the adapter too. This applies
      to models of transformers. For other models the Trainer's file has all tensors, and `Injection.save` saves the
      adapter.
    - The schedules of methods are advanced.
    - If the optimizer or the parameters do not follow the method's rules, an error is raised before the first step.

    After a failed training the callback leaves no changes on the model. After a complete training, only the changed
    ``save_pretrained`` remains.

    Args:
        model: the model that is trained. It is only needed if transformers has quantized the model and only a submodule
            is adapted.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        await_trainer(self)
        if model is not None and within(model):
            replace_methods(Journal(), [model], Admitted, self)
        self._frozen: set[str] = set()
        self._state: Any = None
        """The Trainer's state in the current training."""
        self.asked = False
        """Whether the Trainer calls `keep` for its checkpoints."""
        self._told = False
        """Whether the model's ``save_pretrained`` calls `keep` for checkpoints."""
        self._armed = Journal()
        self._hooks: list[RemovableHandle] = []
        self._evaluating = False
        self._training: list[Injection] = []
        self._stepped: list[AppliedMethod] = []
        self._before: dict[str, bytes] = {}
        """Digests of the state between steps (non-persistent buffers) before training."""
        self._own: AppliedMethod | None = None
        """The injection whose optimizer saves its state between steps."""
        self._read: set[str] | None = None
        """Keys of the checkpoint that was loaded since `_await_checkpoint` was called; None if none was loaded."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare to load a checkpoint, which the Trainer does before `on_train_begin`."""
        model = kwargs["model"]
        has_trainer()
        give_methods_back(Journal(), model, self)
        save_for_trainer(model)
        self._note_state(model)
        self._await_checkpoint(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Prepare to load the best checkpoint, which the Trainer does after logging the run time."""
        if "train_runtime" in (logs or {}):
            self._await_checkpoint(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the frozen parameters, and check that all trainable parameters follow the methods' rules.

        Raises:
            CheckpointError: the checkpoint belongs to an adapter with other options, or to another base.
            TrainingError: trainable parameters do not follow the rules, all parameters are frozen, or the checkpoint
                lacks tensors.
        """
        model, optimizer = kwargs["model"], _inside(kwargs["optimizer"])
        self._disarm()
        self._stop_waiting()
        if within(model) and not any(parameter.requires_grad for parameter in model.parameters()):
            names = ", ".join(repr(injection.name) for injection in within(model))
            raise TrainingError(f"nothing trains: {names} is frozen, as `load` leaves it; call injection.trainable()")
        save_for_trainer(model)
        self._note_state(model)
        self._frozen, self._stepped, self._state = frozen_keys(model), [], state
        self._told = tell_run(model, self)
        self._own = optimizer.injection if isinstance(optimizer, MethodOptimizer) else None
        held = state.stateful_callbacks  # the Trainer writes it into its checkpoints, and reads it back from them
        if state.global_step:
            check_records(model, held.get(STATE, {}), "the checkpoint")
            self._check_read(model, lambda: of_run(args, state, optimizer))
        held[STATE] = records(model)
        self._training = training(model)
        for injection in self._training:
            if injection is not self._own:
                _check_plain(injection)
                check_steps(injection, state.max_steps)
                self._stepped += scheduled(injection)
        if isinstance(optimizer, MethodOptimizer) and optimizer.total_steps is None:
            check_steps(optimizer.injection, state.max_steps)
            optimizer.total_steps = state.max_steps

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the Trainer's loss contains the losses that methods add.

        Raises:
            TrainingError: the Trainer's loss does not contain them, since it is not the model's loss.
        """
        for injection in self._training:
            if injection.state.recorder.losses.waits(injection.state, injection.name):
                raise TrainingError(
                    "the Trainer does not use the model's loss (label smoothing, compute_loss_func ...), so it omits "
                    f"the loss that {injection.name!r} ({injection.method.name}) adds: use "
                    "peftcore.training.PeftcoreTrainer, or add injection.losses() in a loss function of your own"
                )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the loss of the last batch, as `on_substep_end` does for other batches."""
        self.on_substep_end(args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the schedules of methods, except for a method whose `MethodOptimizer` does this."""
        optimizer = kwargs["optimizer"]
        if isinstance(optimizer, AcceleratedOptimizer) and optimizer.step_was_skipped:  # a gradient scaler's overflow
            return
        take_steps(self._stepped, state.global_step + 1, state.max_steps)

    def has_checkpoint(self, folder: str | os.PathLike[str]) -> bool:
        """Returns True if a folder has the Trainer's name for the checkpoint of the current step."""
        return self._state is not None and Path(folder).name == f"{PREFIX_CHECKPOINT_DIR}-{self._state.global_step}"

    def keep(self, model: nn.Module, whole: dict[str, Any], prefix: str = "") -> None:
        """Remove frozen tensors from a state dict of the model, and add the state between steps (non-persistent
        buffers)."""
        self._frozen &= frozen_keys(model)  # another callback may have let more train
        for key in self._frozen:
            whole.pop(prefix + key, None)
        whole.update({prefix + held.key: held.buffer for held in state_between_steps(model) if self._wanted(held)})

    # Where nobody asks, a checkpoint's state_dict() cannot be told from others. The next call is the checkpoint's only
    # between the last event before a checkpoint and the checkpoint, so the model is changed no longer
    # than that: a failure anywhere else finds it as it was.

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare to write a checkpoint, unless the Trainer evaluates first."""
        self._evaluating = control.should_evaluate
        if control.should_save and not control.should_evaluate:
            self._arm(kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare to write a checkpoint, as after a step."""
        self.on_step_end(args, state, control, **kwargs)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Prepare to write a checkpoint after an evaluation. Nothing is done if the metric for the best model is
        missing, since the Trainer then raises an error."""
        wanted = args.metric_for_best_model
        found = wanted is None or any(key in (metrics or {}) for key in (wanted, f"eval_{wanted}"))
        if self._evaluating and found and (control.should_save or args.save_strategy == "best"):
            self._arm(kwargs["model"])

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Undo the preparation for a checkpoint, since another evaluation runs first."""
        self._disarm(self._evaluating)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the model after a checkpoint was written. If the Trainer saves the model in a custom way
        (sentence-transformers) and omitted tensors, add them to the checkpoint.
        """
        self._disarm()
        model, folder = kwargs["model"], Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir() and not any(folder.rglob("adapter.json")):
            save_adapters(model, folder)
            if not is_sharded(model):
                whole = model.state_dict()
                self.keep(model, whole)
                save_beside(whole, folder)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the model: no checkpoint came."""
        self._disarm()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the model: no checkpoint came."""
        self._disarm()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """If the best checkpoint was loaded, check that it had all tensors of the adapters.

        Raises:
            TrainingError: the checkpoint lacks tensors of adapters.
        """
        self._disarm()
        tell_run(kwargs["model"], None)
        self._stop_waiting()
        best = state.best_model_checkpoint
        self._check_read(kwargs["model"], lambda: best and Path(best))

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the adapters into the folder that is pushed, since the Trainer copies only its own files from a
        checkpoint."""
        if state.is_world_process_zero:
            save_adapters(kwargs["model"], args.output_dir)

    def _arm(self, model: nn.Module) -> None:
        """Change only the next call of the model's `state_dict`: its result has no frozen tensors, and has the state
        between steps."""
        self._disarm(self._evaluating)
        if self.asked or self._told:
            return

        def state_dict(*args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
            model.__dict__.pop("state_dict", None)
            whole: dict[str, Any] = model.state_dict(*args, prefix=prefix, **kwargs)
            self.keep(model, whole, prefix)
            return whole

        self._armed.put(model, "", "state_dict", state_dict)

    def _note_state(self, model: nn.Module) -> None:
        """Record digests of the state between steps that has no recorded digest yet."""
        for held in state_between_steps(model):
            self._before.setdefault(held.key, digest(held.buffer))

    def _wanted(self, held: TransientBuffer) -> bool:
        """Whether a checkpoint has to contain a non-persistent buffer: no `MethodOptimizer` saves it, and it changed or
        belongs to a schedule."""
        if held.injection is self._own:
            return False
        changed = held.key in (self._read or ()) or self._before.get(held.key) != digest(held.buffer)
        return changed or any(True for _ in scheduled(held.injection))

    def _await_checkpoint(self, model: nn.Module) -> None:
        """Register hooks for loading a checkpoint. They load the state between steps, and suppress warnings about
        frozen tensors that the checkpoint omits."""
        self._stop_waiting()
        self._read = None
        frozen = frozen_keys(model)

        def take_state(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
            self._read = (self._read or set()).union(state_dict)
            for held in state_between_steps(model):
                if held.key in state_dict:
                    held.buffer.copy_(state_dict.pop(held.key))

        def without_frozen(module: nn.Module, keys: Any) -> None:
            read, ours = self._read or set(), keys_of(model, within(model))
            passed = frozen if frozen.isdisjoint(read) else set()
            if ours.isdisjoint(read):  # it lies beside what was saved, and is read as training begins
                passed = passed | ours
            keys.missing_keys[:] = [key for key in keys.missing_keys if key not in passed]

        self._hooks = [
            model.register_load_state_dict_pre_hook(take_state),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_post_hook(without_frozen),  # type: ignore[no-untyped-call]
        ]

    def _stop_waiting(self) -> None:
        """Remove the hooks of `_await_checkpoint`."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def _check_read(self, model: nn.Module, find: Callable[[], Path | None]) -> None:
        """If a checkpoint was loaded, check that it had all tensors of the trainable adapters and the state of their
        schedules. If it had no tensors of adapters, they are read from the extra file in its folder."""
        if self._read is None:
            return
        none = not is_sharded(model) and keys_of(model, within(model)).isdisjoint(self._read)
        if none and (folder := find()) is not None:
            self._read |= read_beside(model, folder)
        state = [held for held in state_between_steps(model) if any(True for _ in scheduled(held.injection))]
        wanted = {held.key for held in state if self._wanted(held)}.union(keys_of(model, training(model)))
        if lacking := sorted(wanted - self._read):
            raise TrainingError(
                f"the checkpoint lacks {len(lacking)} tensors of adapters, such as {lacking[0]}: it belongs to "
                "other adapters, or its Trainer had no PeftcoreCallback. A checkpoint of a Trainer with its own way to "
                "save models (sentence-transformers) has to stay in output_dir"
            )

    def _disarm(self, evaluating: bool = False) -> None:
        self._evaluating = evaluating
        armed, self._armed = self._armed, Journal()
        armed.undo()


def _inside(optimizer: Any) -> Any:
    """Returns the optimizer inside the wrappers of accelerate."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _check_plain(injection: Injection) -> None:
    """Check that an injection can be trained with a plain torch optimizer."""
    if gradient_rules(injection):
        raise TrainingError(
            f"{injection.name!r} has a rule for gradients that this optimizer does not apply: pass "
            "Trainer(..., optimizers=(injection.optimizer(torch.optim.AdamW, lr=...), None))"
        )
