"""Losses that methods add are added once for each step of the optimizer, in however many forwards it is made."""

from typing import Any

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
