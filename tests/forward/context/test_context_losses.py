"""Losses that methods add are added once for each step of the optimizer, in however many forwards it is made."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

import peftcore
from peftcore.testing.hosts import HOSTS


@pytest.fixture
def host() -> tuple[Any, torch.Tensor]:
    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model.train(), "adalora", orthogonality=0.5)
    for parameter in injection.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model, inputs["input_ids"].repeat(2, 1)[:4]


def own(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """What the method adds to the loss of a forward."""
    return model.train()(input_ids=ids, labels=ids, **more).loss - model.eval()(input_ids=ids, labels=ids, **more).loss


def test_parts_of_a_batch_add_parts_of_it(host: tuple[Any, torch.Tensor]) -> None:
    model, ids = host
    alone = own(model, ids)
    assert alone > 0.1
    items = ids[:, 1:].numel()
    torch.testing.assert_close(own(model, ids, num_items_in_batch=items), alone, rtol=1e-4, atol=1e-5)
    parts = [own(model, ids[rows], num_items_in_batch=items) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0], alone / 4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(parts), alone, rtol=1e-4, atol=1e-5)


def test_labels_that_are_left_out_do_not_count(host: tuple[Any, torch.Tensor]) -> None:
    model, ids = host
    labels = ids.clone()
    labels[:, :3] = -100
    alone = own(model, ids)
    half = {"input_ids": ids, "labels": labels, "num_items_in_batch": 2 * labels.ne(-100).sum()}
    added = model.train()(**half).loss - model.eval()(**half).loss
    torch.testing.assert_close(added, alone / 2, rtol=1e-3, atol=1e-4)


class Counted(peftcore.author.Operator):
    """Adds one to the loss in each call."""

    def __init__(self, site: peftcore.author.Site) -> None:
        super().__init__(site)
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def forward(self, call: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if self.training:
            peftcore.author.forward_context().add_loss(1.0 + self.zero, self)
        return call(x)


class Counts(peftcore.author.Method):
    name, target = "toy_counts", ("attn.k", "attn.v")
    tags = peftcore.author.Tags(category="additive", paper="none")

    class Config(peftcore.author.MethodConfig):
        method: Literal["toy_counts"] = "toy_counts"

    def inject(self, model: torch.nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, lambda place: Counted(place))

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 1


def test_what_a_prompt_goes_through_once_more_adds_nothing() -> None:
    """LLaMA-Adapter's prompt goes through the matrices of keys and values, as tokens do."""
    model, inputs = HOSTS["llama"].build()
    ids = inputs["input_ids"]
    counts = peftcore.apply(model, Counts)
    alone = own(model, ids)
    torch.testing.assert_close(alone, torch.tensor(float(len(counts.sites))))
    peftcore.apply(model, "llama_adapter")
    torch.testing.assert_close(own(model, ids), alone)
