"""Models whose calls are told the task of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import peftcore


def assert_beams_keep_the_tasks_of_their_rows(model: nn.Module, ids: Tensor, tasks: list[int]) -> None:
    """Two rows with a task each generate by beams what each generates by itself, and other tasks generate others."""
    host: Any = model
    options = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with peftcore.call(model, task=tasks):
        together = host.generate(ids, **options)
    for row, task in enumerate(tasks):
        with peftcore.call(model, task=task):
            assert torch.equal(host.generate(ids[row : row + 1], **options)[0], together[row])
    with peftcore.call(model, task=1):
        assert not torch.equal(host.generate(ids, **options), together)
