"""TRL's ``DPOTrainer`` for adapted models: the model is its own reference, and every method trains.

    loss = -log sigmoid(beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))))

p is the model. q is the reference; it computes the log-probabilities of all pairs once, before the first step.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

import peftcore
from peftcore_lab.tasks.task import IGNORED, OwnTrainer


@dataclass
class Scores:
    """The values of each token's prediction that `DPOTrainer` reads, ``[rows, tokens - 1]``. They are zero at positions
    without a label."""

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    aux_loss: Tensor | None
    """The load-balancing loss of a mixture-of-experts model; None for other models."""


class ByLogits:
    """Wraps a model so that TRL gets log-probabilities from its logits.

    TRL would multiply hidden states by the weight of the head, which skips all adapters at the head and at the model.
    It would also make the model compute a loss from labels, to which methods would add their own losses. Here the model
    runs without labels, and gets the lengths of the prompts.
    """

    def __init__(self, model: Callable[..., Any], host: nn.Module) -> None:
        self._model, self._host = model, host

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> Scores:
        counts = labels != IGNORED
        with peftcore.call(self._host, prompt_length=counts.int().argmax(1)):
            output = self._model(**inputs)
        logits = output.logits[:, -labels.shape[1] :][:, :-1]  # soft prompts may have rows before the tokens
        where, labels = counts[:, 1:], labels[:, 1:]
        scored = logits[where].float()  # [tokens of answers, vocabulary]
        found = scored.log_softmax(-1)

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(where.shape).masked_scatter(where, values)

        with torch.no_grad():
            entropy = -(found.exp() * found).sum(-1)
            mean, top = scored.mean(-1), scored.argmax(-1) == labels[where]
        log_probs = found.gather(1, labels[where][:, None])[:, 0]
        return Scores(placed(log_probs), placed(entropy), placed(mean), placed(top), output.get("aux_loss"))


class SelfReferencing(DPOTrainer):
    """`DPOTrainer` whose reference is the model before training: without the adapter, or with the adapter that training
    continues. Examples must be tokenized."""

    injection: peftcore.Injection | None
    model: Any

    def __init__(self, model: Any, *, continued: bool, **options: Any) -> None:
        self._continued = continued
        super().__init__(model, **options)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the log-probabilities of both answers, ``[pairs]`` each, by the reference. It is called when the
        Trainer is created, before a checkpoint is read."""
        bare = self.injection is not None and not self._continued
        training = self.model.training
        self.model.eval()
        try:
            with self.injection.disabled() if self.injection is not None and bare else nullcontext():
                return self._log_probs(model, inputs)
        finally:
            self.model.train(training)

    def _log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL asks transformers by a name that will go
            asked = ByLogits(model, self.model)
            found: tuple[Tensor, Tensor] = super().compute_ref_log_probs(asked, inputs)  # type: ignore[no-untyped-call]
        return found

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        asked = ByLogits(model, self.model)
        return super().compute_loss(asked, inputs, *args, **kwargs)  # type: ignore[no-untyped-call]

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, and the reward margins ``[pairs]``: how much higher the reward of the preferred answer is.
        The margins are returned twice, as predictions and as labels, since the Trainer computes no metrics without
        labels."""
        inputs = self._prepare_inputs(inputs)
        chosen, rejected = self._log_probs(model, inputs)
        margins = self.beta * ((chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"]))
        return nn.functional.softplus(-margins).mean(), margins, margins

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Returns the examples with the log-probabilities of the reference. TRL would store them in a file named by a
        digest of all weights, and all processes would read the file of the first one. Here there is no file."""
        loader = DataLoader(dataset, batch_size, collate_fn=self.data_collator)
        found = [
            torch.stack(self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch)), 1)
            for batch in self.accelerator.prepare(loader)
        ]
        chosen, rejected = torch.cat(found).T.tolist()
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes no model card, since a run's folder is not a repository of the Hub."""

    def _send_telemetry(self) -> None:
        """Sends no telemetry to TRL."""


def preferred(found: Any) -> dict[str, float]:
    """Return the loss, the share of pairs whose preferred answer has the higher reward, and the mean reward margin. All
    pairs have equal weights, unlike in the Trainer's own mean over the batches of several processes."""
    margins = torch.as_tensor(found.predictions).double()
    return {
        "loss": nn.functional.softplus(-margins).mean().item(),
        "reward_accuracy": (margins > 0).double().mean().item(),
        "reward_margin": margins.mean().item(),
    }


def trainer(tokenizer: Any, beta: float, continued: bool) -> OwnTrainer:
    """Return the Trainer of the task preference. `continued` is True if training continues an adapter."""
    return OwnTrainer(
        SelfReferencing,
        # TRL would switch off the dropout that was asked for in the adapter too.
        functools.partial(DPOConfig, beta=beta, precompute_ref_log_probs=True, disable_dropout=False),
        {"processing_class": tokenizer, "continued": continued},
    )
