"""Training an adapted model with transformers' ``Trainer``: small checkpoints, exact resume, the method's schedule.

    injection = peftcore.apply(model, "adalora")
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-3)
    trainer = Trainer(model, args, ..., optimizers=(optimizer, None), callbacks=[PeftcoreCallback()])

Leave ``optimizers`` out for methods that need none of their own; the callback says so where one is needed. A model that
transformers has quantized is given to the callback, ``PeftcoreCallback(model)``: the Trainer would refuse it, since it
knows no adapters but its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from peftcore.errors import TrainingError
from peftcore.forward.host_state import injections
from peftcore.injection.applied import AppliedMethod
from peftcore.injection.injection import Injection
from peftcore.registry.plugins import layer_of
from peftcore.training.optimizer import MethodOptimizer, gradient_rules, scheduled, take_steps, transient


class PeftcoreCallback(transformers.TrainerCallback):
    """A callback for the Trainer of a model that was adapted in place.

    * Checkpoints hold trained tensors and those of adapters, not the frozen base; they resume exactly.
    * Methods with a schedule take their steps.
    * After training, ``trainer.save_model()`` writes the base without adapters; `Injection.save` writes those.

    Nothing of it stays on the model when training ends or fails.

    Args:
        model: the adapted model, where transformers has quantized it.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        if model is not None and _within(model):
            vars(model)[ADMITTED] = _Once(model)
        self._frozen: set[str] = set()
        self._undo: Callable[[], Any] | None = None
        self._evaluating = False
        self._stepped: list[AppliedMethod] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Expect a checkpoint to resume from: the Trainer loads it before the event that training begins."""
        vars(kwargs["model"]).pop(ADMITTED, None)
        self._await_checkpoint(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Expect the best checkpoint: the Trainer logs the run's time last, then loads it."""
        if "train_runtime" in (logs or {}):
            self._await_checkpoint(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the frozen parameters, and check that the optimizer follows the methods' rules.

        Raises:
            TrainingError: it does not.
        """
        model, optimizer = kwargs["model"], _inside(kwargs["optimizer"])
        self._disarm()
        _save_adapters(model, True)
        self._frozen, self._stepped = frozen_keys(model), []
        own = optimizer.injection if isinstance(optimizer, MethodOptimizer) else None
        for injection in _within(model):
            if not any(parameter.requires_grad for parameter in injection.parameters()):
                continue
            if injection is not own:
                _check_plain(injection, resuming=state.global_step > 0)
                self._stepped += scheduled(injection)
        if isinstance(optimizer, MethodOptimizer) and optimizer.total_steps is None:
            optimizer.total_steps = state.max_steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the methods' steps, where the optimizer is not their own."""
        optimizer = kwargs["optimizer"]
        if isinstance(optimizer, AcceleratedOptimizer) and optimizer.step_was_skipped:  # a gradient scaler's overflow
            return
        take_steps(self._stepped, state.global_step + 1, state.max_steps)

    # The next call of state_dict() is the checkpoint's only between the last event before a checkpoint and the
    # checkpoint, so the model is changed no longer than that: a failure anywhere else finds it as it was.

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Expect a checkpoint, or an evaluation and then a checkpoint."""
        self._evaluating = control.should_evaluate
        if control.should_save and not control.should_evaluate:
            self._arm(kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Expect a checkpoint, as after a step."""
        self.on_step_end(args, state, control, **kwargs)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Expect a checkpoint, unless the Trainer is about to fail for want of the metric that it chooses by."""
        wanted = args.metric_for_best_model
        found = wanted is None or any(key in (metrics or {}) for key in (wanted, f"eval_{wanted}"))
        if self._evaluating and found and (control.should_save or args.save_strategy == "best"):
            self._arm(kwargs["model"])

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Expect no checkpoint yet: another evaluation came first."""
        self._disarm(self._evaluating)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the model: the checkpoint is written."""
        self._disarm()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the model: no checkpoint came."""
        self._disarm()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the model: no checkpoint came."""
        self._disarm()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the model save the base without adapters from now on."""
        self._disarm()
        _save_adapters(kwargs["model"], False)

    def _arm(self, model: nn.Module) -> None:
        """Let the next state_dict(), and no other, leave out frozen tensors."""
        self._disarm(self._evaluating)

        def state_dict(*args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
            self._disarm()
            whole: dict[str, Any] = model.state_dict(*args, prefix=prefix, **kwargs)
            for key in self._frozen:
                whole.pop(prefix + key, None)
            return whole

        model.__dict__["state_dict"] = state_dict
        self._undo = lambda: model.__dict__.pop("state_dict", None)

    def _await_checkpoint(self, model: nn.Module) -> None:
        """Let a checkpoint of the adapters load without a warning of all the keys that it leaves out."""
        self._disarm()
        frozen = frozen_keys(model)

        def without_frozen(module: nn.Module, keys: Any) -> None:
            if frozen.issubset(keys.missing_keys):
                keys.missing_keys[:] = [key for key in keys.missing_keys if key not in frozen]

        handle = model.register_load_state_dict_post_hook(without_frozen)  # type: ignore[no-untyped-call]
        self._undo = handle.remove

    def _disarm(self, evaluating: bool = False) -> None:
        self._evaluating = evaluating
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


ADMITTED = "_hf_peft_config_loaded"
"""The attribute that marks a quantized model with adapters for transformers. Left true, it would save those of peft."""


class _Once:
    """True when it is first asked for, by the Trainer as it begins, and gone from the model then."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __bool__(self) -> bool:
        vars(self._model).pop(ADMITTED, None)
        return True


def _within(model: nn.Module) -> list[Injection]:
    """Returns the injections of the model, or of its parts, where it wraps an adapted one."""
    return [injection for module in model.modules() for injection in injections(module).values()]


def _inside(optimizer: Any) -> Any:
    """Returns the optimizer that accelerate wrapped."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _save_adapters(model: nn.Module, wanted: bool) -> None:
    """Choose whether ``save_pretrained`` writes the tensors of injections."""
    if isinstance(model, transformers.PreTrainedModel):
        ignored, ours = set(model._keys_to_ignore_on_save or ()), adapter_keys(model)
        model._keys_to_ignore_on_save = ignored - ours if wanted else ignored | ours


def _check_plain(injection: Injection, resuming: bool) -> None:
    """Check that an injection can train with an optimizer that is not its own."""
    remedy = "Trainer(..., optimizers=(injection.optimizer(torch.optim.AdamW, lr=...), None))"
    if gradient_rules(injection):
        raise TrainingError(f"{injection.name!r} has a rule for gradients that this optimizer does not know: {remedy}")
    if resuming and any(True for _ in transient(injection)):
        raise TrainingError(
            f"{injection.name!r} keeps statistics between steps, and this optimizer did not save them: {remedy} in "
            "both runs resumes exactly"
        )


def adapter_keys(model: nn.Module) -> set[str]:
    """Returns the keys of the host's state dict that belong to injections."""
    ours = {id(module) for injection in _within(model) for _, module in injection.modules()}
    prefixes = tuple(f"{path}." for path, module in model.named_modules(remove_duplicate=False) if id(module) in ours)
    return {key for key in model.state_dict() if key.startswith(prefixes)}


def frozen_keys(model: nn.Module) -> set[str]:
    """Returns the keys of the host's state dict that cannot change in training: frozen parameters of the base, and all
    tensors of a quantized weight.

    Buffers of the base stay: the host may write into them.
    """
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    packed = [path for path, module in model.named_modules() if layer_of(module, "weight").packed]
    below = tuple(f"{path}." for path in packed if path)
    frozen |= {key for key in model.state_dict() if below and key.startswith(below)}
    return frozen - adapter_keys(model)
