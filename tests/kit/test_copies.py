"""Copies of hosts are as those of deepcopy: equal, with the same ties and storages, and nobody else's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore.testing import APART, HOSTS, NotApplicable
from peftcore.testing.copies import Copies


def held(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether they hold the same tensors, of the same kinds."""
    mine, theirs = held(one), held(other)
    return mine.keys() == theirs.keys() and all(
        type(mine[name]) is type(theirs[name])
        and mine[name].requires_grad == theirs[name].requires_grad
        and torch.equal(mine[name], theirs[name])
        for name in mine
    )


def ties(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names of one tensor."""
    tensors = held(model)
    return [(one, other) for one in tensors for other in tensors if one < other and tensors[one] is tensors[other]]


EVERY = {**HOSTS, **APART}


@pytest.mark.parametrize("name", EVERY)
def test_a_copy_is_as_one_of_deepcopy(name: str) -> None:
    try:
        original = EVERY[name].build()
    except NotApplicable as reason:
        pytest.skip(str(reason))
    copies = Copies(original)
    (one, inputs), (two, _), (deep, _) = copies(), copies(), copy.deepcopy(original)
    assert equal(one, deep) and ties(one) == ties(deep)
    assert [(path, type(module)) for path, module in one.named_modules()] == [
        (path, type(module)) for path, module in deep.named_modules()
    ]
    with torch.no_grad():
        outputs = [EVERY[name].output(each(**inputs)) for each in (one.eval(), deep.eval())]
        assert torch.equal(*outputs)
        for tensor in held(one).values():
            tensor.zero_()
        for tensor in inputs.values():
            tensor.zero_()
    shared = {id(module) for module in one.modules()}
    for other in (original[0], two):
        assert not shared & {id(module) for module in other.modules()}
        assert equal(other, deep)
    assert all(torch.equal(value, original[1][key]) for key, value in copies()[1].items())


def test_one_storage_stays_one() -> None:
    whole = torch.arange(6.0)
    mine = Copies({"whole": whole, "part": whole[2:4], "again": whole})()
    mine["part"].zero_()
    assert mine["again"] is mine["whole"] and mine["whole"].tolist() == [0, 1, 0, 0, 4, 5]
    assert whole.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_cannot_be_pickled_is_copied_too() -> None:
    class Inside(nn.Linear):
        pass

    original: Any = Inside(2, 2)
    one = Copies(original)()
    assert type(one) is Inside and one.weight is not original.weight and torch.equal(one.weight, original.weight)


def test_a_config_is_nobody_elses() -> None:
    pytest.importorskip("transformers")
    copies = Copies(HOSTS["llama"].build())
    one: Any = copies()[0]
    one.config.use_cache = True
    assert one.config is one.model.config
    assert copies()[0].config.use_cache is False  # type: ignore[union-attr]
