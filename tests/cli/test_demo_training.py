"""Every method of the demonstration does something: a trained head would hide an adapter that does nothing.

So the head is trained first (a linear probe on the real encoder and tweets) and then frozen: whatever lowers the
training loss from there is the adapter's own work.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import nn

import peftcore
from peftcore.cli import demo
from peftcore.cli.data import Encoded, arrange, draw, encode
from peftcore.cli.models import load_model, load_tokenizer
from peftcore.cli.training import Schedule, run

TEXTS, STEPS, BATCH_SIZE = 32, 8, 16
METHODS = [name for name in demo.RECIPES if name not in ("linear_probe", demo.FULL)]
pytestmark = pytest.mark.xdist_group("demo training")


class Silent:
    def phase(self, name: str, total: int) -> None: ...

    def advance(self) -> None: ...


@dataclass
class Probed:
    """The encoder under a trained head, and the tweets on which the methods go on."""

    model: nn.Module
    head: tuple[str, ...]
    tokenizer: Any
    texts: list[Encoded]

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
        rows = arrange(draw(self.texts, STEPS * BATCH_SIZE, seed), BATCH_SIZE, seed)
        schedule = Schedule(STEPS, BATCH_SIZE, seed)
        run(model, self.tokenizer, rows, self.texts[:2], recipe.learning_rate, schedule, Silent())
        parameters = dict(model.named_parameters())
        assert frozen and all(torch.equal(parameters[name], value) for name, value in frozen.items())
        return self.loss(model) / before


@pytest.fixture(scope="module")
def probed() -> Probed:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder, task = demo.model_folder(), demo.tweets()
    tokenizer = load_tokenizer(folder)
    model, head = load_model(folder, task.labels, tokenizer, seed=0)
    rows = arrange(encode(tokenizer, draw(task.train, 32 * 32, 0), task.labels, demo.MAX_LENGTH), 32, 0)
    probe = peftcore.apply(model, "linear_probe", train=head, seed=0)
    rate = demo.RECIPES["linear_probe"].learning_rate
    outcome = run(model, tokenizer, rows, rows[:2], rate, Schedule(32, 32, 0), Silent())
    assert outcome.losses[-1] < 0.95 * outcome.losses[0], "the probe itself learned nothing"
    probe.bake()
    torch.set_num_threads(threads)
    return Probed(model, head, tokenizer, rows[:TEXTS])


@pytest.mark.parametrize("method", METHODS)
def test_lowers_the_training_loss_below_what_the_trained_head_reaches(method: str, probed: Probed):
    left = [probed.loss_left_by(method, demo.RECIPES[method], seed) for seed in range(3)]
    assert max(left) <= 0.95, left


def test_an_adapter_that_does_nothing_would_be_noticed(probed: Probed, monkeypatch):
    class InertConfig(peftcore.MethodConfig):
        method: Literal["inert"] = "inert"

    class InertOperator(peftcore.Operator):
        """Trained, saved, called, and without effect."""

        def __init__(self, site, config):
            super().__init__(site)
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, call, x):
            return call(x) + 0 * self.gain

    class Inert(peftcore.Method):
        name = "inert"
        Config = InertConfig
        tags = peftcore.Tags(category="additive", paper="0000.00000")
        target = ("attn.q",)

        def inject(self, model, config, surgeon):
            for site in surgeon.sites():
                surgeon.graft(site, InertOperator, config)

        @staticmethod
        def parameter_count(site, config):
            return 1

    monkeypatch.setattr("peftcore.catalogue._registered", {})
    peftcore.register(Inert)
    assert probed.loss_left_by("inert", demo.Recipe(1e-2), seed=0) == pytest.approx(1, abs=1e-6)
