"""Parameters that no process has cut are whole: what gathers pieces passes them on as they are."""

import pytest
import torch
from torch import nn

from peftcore.layers.fsdp import gathered, is_sharded, is_sharded_class, loading_whole, one_writes
from peftcore.layers.pieces import is_cut, whole


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def test_a_plain_tensor_is_whole_and_stays_itself(model: nn.Module) -> None:
    weight = model[0].weight
    assert not is_cut(weight) and whole(weight) is weight


def test_no_model_is_sharded_without_a_group_of_processes(model: nn.Module) -> None:
    assert not is_sharded(model) and not is_sharded_class(type(model))
    with one_writes(model) as mine:
        assert mine


def test_nothing_is_copied_where_nothing_is_cut(model: nn.Module) -> None:
    weight = model[0].weight
    with gathered(model, lambda: [pytest.fail("what is whole is not asked for")]):
        assert model[0].weight is weight


def test_whole_values_load_and_no_hook_stays(model: nn.Module) -> None:
    values = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    with loading_whole(model):
        model.load_state_dict(values)
    assert all(torch.equal(value, torch.ones_like(value)) for value in model.state_dict().values())
    assert not model._load_state_dict_pre_hooks
