"""The demonstration: its tweets are clean and kept apart, and every method does something.

A trained head would hide an adapter that does nothing. So the head is trained first (a linear probe on the real encoder
and tweets) and then frozen: whatever lowers the training loss from there is the adapter's own work.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import nn

import peftcore
from peftcore.models.loading import classifier, load_tokenizer
from peftcore_lab.comparisons import demo
from peftcore_lab.data.texts import Encoded, Example, encode
from peftcore_lab.runs.run import FULL

TEXTS, STEPS, BATCH_SIZE = 32, 16, 8
PROBED_ON = 512
LENGTH = 12
"""Tokens of the longest tweet: all that is proved holds for short ones, which take a third of the time."""
METHODS = [name for name in demo.RECIPES if name not in ("linear_probe", FULL)]


def trained(
    model: nn.Module, tokenizer: Any, rows: list[Encoded], rate: float, batch: int, folder: Path, seed: int = 0
) -> list[float]:
    """One pass with what the Trainer does by itself; the losses, step by step."""
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=rate, warmup_steps=0.1,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=seed,
        dataloader_pin_memory=False,
    )  # fmt: skip
    collate = transformers.DataCollatorWithPadding(tokenizer)
    run = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@dataclass
class Probed:
    """The encoder under a trained head, and the tweets on which the methods go on."""

    model: nn.Module
    head: tuple[str, ...]
    tokenizer: Any
    texts: list[Encoded]
    folder: Path

    def loss(self, model: nn.Module) -> float:
        batch = self.tokenizer.pad(self.texts, return_tensors="pt")
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    def loss_left_by(self, method: str, recipe: demo.Recipe, seed: int) -> float:
        """The part of the loss that is left after a few steps of ``method`` with the head frozen."""
        model = copy.deepcopy(self.model)
        peftcore.apply(model, method, seed=seed, **recipe.options)
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith(self.head)}
        before = self.loss(model)
        rows = self.texts * (STEPS * BATCH_SIZE // TEXTS)
        trained(model, self.tokenizer, rows, recipe.learning_rate, BATCH_SIZE, self.folder, seed)
        parameters = dict(model.named_parameters())
        assert frozen and all(torch.equal(parameters[name], value) for name, value in frozen.items())
        return self.loss(model) / before


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder, task = demo.model_folder(), demo.tweets()
    tokenizer = load_tokenizer(folder)
    transformers.set_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    model, head = classifier(auto, folder, task.labels, pad_token_id=tokenizer.pad_token_id)
    found = encode(tokenizer, [each for each in task.train if len(each.text) <= 50], task.labels, demo.MAX_LENGTH)
    rows = [row for row in found if len(row["input_ids"]) <= LENGTH][:PROBED_ON]
    probe = peftcore.apply(model, "linear_probe", train=head, seed=0)
    scratch = tmp_path_factory.mktemp("probe")
    losses = trained(model, tokenizer, rows, demo.RECIPES["linear_probe"].learning_rate, 32, scratch)
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4]), "the probe itself learned nothing"
    probe.bake()
    torch.set_num_threads(threads)
    return Probed(model, head, tokenizer, rows[:TEXTS], scratch)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_lowers_the_training_loss_below_what_the_trained_head_reaches(method: str, probed: Probed):
    assert probed.loss_left_by(method, demo.RECIPES[method], seed=1) <= 0.95


@pytest.mark.slow
def test_an_adapter_that_does_nothing_would_be_noticed(probed: Probed):
    class InertConfig(peftcore.author.MethodConfig):
        method: Literal["inert"] = "inert"

    class InertOperator(peftcore.author.Operator):
        """Trained, saved, called, and without effect."""

        def __init__(self, site, config):
            super().__init__(site)
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, call, x):
            return call(x) + 0 * self.gain

    class Inert(peftcore.author.Method):
        name = "inert"
        Config = InertConfig
        tags = peftcore.author.Tags(category="additive", paper="0000.00000")
        target = ("attn.q",)

        def inject(self, model, config, surgeon):
            for site in surgeon.sites():
                surgeon.graft(site, InertOperator, config)

        @staticmethod
        def parameter_count(site, config):
            return 1

    peftcore.register(Inert)
    assert probed.loss_left_by("inert", demo.Recipe(1e-2), seed=0) == pytest.approx(1, abs=1e-6)


def test_the_demo_holds_out_no_tweet_that_it_trains_on():
    held_out, tuning = demo.tweets(), demo.tweets(tuning=True)
    assert held_out.labels == ("negative", "neutral", "positive")
    assert held_out.train == tuning.train
    pools = [{example.text for example in pool} for pool in (held_out.train, held_out.held_out, tuning.held_out)]
    assert [len(pool) for pool in pools[1:]] == [1000, 1000]
    assert not pools[0] & pools[1] and not pools[0] & pools[2] and not pools[1] & pools[2]


def test_cleaning_drops_links_repetitions_and_contradictions():
    raw = ["so happy http://t.co/x", "RT @you: So happy!", "at last_\x99\x85", "no", "No."]
    kept = demo.clean(Example(text, label) for text, label in zip(raw, "ppnpn", strict=True))
    assert kept == [Example("so happy", "p"), Example("at last", "n")]
