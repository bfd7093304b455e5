"""TRL's ``DPOTrainer`` for adapted models: the model is its own reference, and every method trains.

    loss = -log sigmoid(beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))))

p is the model, q the reference, which answers once for each pair before the first step.
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
    """The values of each token's prediction that `DPOTrainer` reads, ``[rows, tokens - 1]``, zero where no label is."""

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    aux_loss: Tensor | None
    """The loss of a mixture of experts by how unevenly the router chooses; None of other models."""


class ByLogits:
    """Wraps a model so that TRL gets log-probabilities from its logits.

    TRL would multiply hidden states by the weight of the head, past all adapters at the head and at the model, and
    would make the model compute a loss of labels, to which methods would add their own losses. Here the model runs as
    it is, without labels, and knows where the prompts end.
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
    """`DPOTrainer` whose reference is the model before training: without the adapter, or with the one that training
    continues. Examples are tokenized already."""

    injection: peftcore.Injection | None
    model: Any

    def __init__(self, model: Any, *, continued: bool, **options: Any) -> None:
        self._continued = continued
        super().__init__(model, **options)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the log-probabilities of both answers, ``[pairs]`` each, by the reference. It is asked when the
        Trainer is made, before a checkpoint is read."""
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
        """Returns the loss, and for each pair by how much the reward of the preferred answer is higher, ``[pairs]``, as
        predictions and as labels, without which the Trainer computes no metrics."""
        inputs = self._prepare_inputs(inputs)
        chosen, rejected = self._log_probs(model, inputs)
        margins = self.beta * ((chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"]))
        return nn.functional.softplus(-margins).mean(), margins, margins

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Returns the examples with what the reference says of them: without a file, in which each of several processes
        would look for what the first one wrote, and without a digest of all weights to name it."""
        loader = DataLoader(dataset, batch_size, collate_fn=self.data_collator)
        found = [
            torch.stack(self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch)), 1)
            for batch in self.accelerator.prepare(loader)
        ]
        chosen, rejected = torch.cat(found).T.tolist()
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes no card, since a run's folder is not a repository of the Hub."""

    def _send_telemetry(self) -> None:
        """Sends nothing: nobody asked TRL for it."""


def preferred(found: Any) -> dict[str, float]:
    """Return the loss and the share of pairs whose preferred answer has the higher reward; each pair counts alike,
    where the Trainer would weigh batches of several processes."""
    margins = torch.as_tensor(found.predictions).double()
    return {
        "loss": nn.functional.softplus(-margins).mean().item(),
        "reward_accuracy": (margins > 0).double().mean().item(),
        "reward_margin": margins.mean().item(),
    }


def trainer(tokenizer: Any, beta: float, continued: bool) -> OwnTrainer:
    """Return the Trainer of a task; `continued` says whether training continues an adapter."""
    return OwnTrainer(
        SelfReferencing,
        # TRL would switch off the dropout that was asked for in the adapter too.
        functools.partial(DPOConfig, beta=beta, precompute_ref_log_probs=True, disable_dropout=False),
        {"processing_class": tokenizer, "continued": continued},
    )
