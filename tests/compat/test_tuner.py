"""What peft has between its model and the adapted one."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
tuner = pytest.importorskip("peftcore.compat.tuner")


def test_it_has_what_the_model_has_under_names_of_peft() -> None:
    model = nn.Linear(3, 2)
    found = tuner.Tuner(model)
    assert [*found.state_dict()] == ["model.weight", "model.bias"]
    assert found.in_features == 3 and found.model is model
    x = torch.randn(4, 3)
    for each in (found, copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(each(x), model(x))
    with pytest.raises(AttributeError, match="nothing"):
        _ = found.nothing


def test_it_sees_that_dropout_was_turned_off() -> None:
    found = tuner.Tuner(nn.Linear(3, 2))
    assert not found.dropout_is_off
    for module in found.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    assert found.dropout_is_off
