"""A subclass of transformers' ``Trainer`` for adapted models, also if the Trainer does not use the model's own loss:

    trainer = PeftcoreTrainer(model, args, ..., label_smoothing_factor=0.1)

    class Mine(PeftcoreTrainer, trl.SFTTrainer): ...

The second line combines it with another Trainer.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME

from peftcore.forward.state.own_losses import share_of_step
from peftcore.layers.fsdp import is_sharded
from peftcore.libraries.save_pretrained import saving_base
from peftcore.trainers.callback import PeftcoreCallback
from peftcore.trainers.trainer_checkpoints import STATE, check_records, save_adapters, within


class PeftcoreTrainer(transformers.Trainer):
    """transformers' ``Trainer`` with `PeftcoreCallback`, and with three features that a callback cannot have:

    - Losses of methods (adalora, hra, adapter_fusion) are added to the Trainer's loss, even if the Trainer does not use
      the model's loss: with label smoothing, a ``compute_loss_func``, ``return_dict=False``, or an adapted model inside
      of another model.
    - A checkpoint of an adapter with other options, or of another base, is refused before any of its tensors are read.
    - Models of other libraries are saved like those of transformers: the base, and the adapter in the same folder.

    In a subclass with several base classes, `PeftcoreTrainer` has to be the first one. The arguments are those of the
    ``Trainer``.
    """

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        given = list(kwargs.pop("callbacks", None) or ())
        if not any(each is PeftcoreCallback or isinstance(each, PeftcoreCallback) for each in given):
            given.append(PeftcoreCallback())  # what others ask for, it sees
        super().__init__(model, *args, **{**kwargs, "callbacks": given})
        found = [each for each in self.callback_handler.callbacks if isinstance(each, PeftcoreCallback)]
        self._peftcore = found[0]
        self._peftcore.asked = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the Trainer's loss, plus the losses of methods that the model did not add to its own loss."""
        before = inputs.get("labels")
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = [each.losses() for each in within(self._adapted)] if torch.is_grad_enabled() else []
        own = sum(losses, torch.zeros(()))
        if not own.requires_grad:
            return found
        own = own * self._scale(before, "labels" in inputs, num_items_in_batch)
        return (found[0] + own, *found[1:]) if isinstance(found, tuple) else found + own

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint, TRAINER_STATE_NAME)
        if file.exists():
            held = transformers.TrainerState.load_from_json(str(file)).stateful_callbacks or {}
            check_records(self._adapted, held.get(STATE, {}), resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    @property
    def _adapted(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _scale(self, labels: Any, told: bool, items: Tensor | int | None) -> Tensor | float:
        """Returns the factor for the losses of methods in one batch of a step. With this factor, they count once in the
        whole step.

        Args:
            labels: the labels of the batch.
            told: whether the model got the labels, and has scaled its losses by their number.
            items: the number of labels of the step, in all processes.
        """
        divided = self.loss_is_scaled_for_ga
        if divided is None:
            divided = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        if not divided:  # the Trainer divides all of it by the number of batches
            return 1.0
        if items is None or not isinstance(labels, Tensor):
            return 1.0 / self.current_gradient_accumulation_steps
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if told and self.model_accepts_loss_kwargs:
            return float(processes)
        return processes * share_of_step({"labels": labels, "num_items_in_batch": items}, self._loss_shifts_labels)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self._adapted
        if isinstance(model, transformers.PreTrainedModel):  # its own save_pretrained does it
            super()._save(output_dir, state_dict)
            return
        folder = str(output_dir or self.args.output_dir)
        checkpoint = self._peftcore.has_checkpoint(folder)
        with nullcontext() if checkpoint else saving_base():
            whole = model.state_dict() if state_dict is None else state_dict
            if checkpoint and (state_dict is None or not is_sharded(model)):
                self._peftcore.keep(model, whole)
            super()._save(folder, whole)
        if self.args.should_save:
            save_adapters(model, folder, state_dict)
