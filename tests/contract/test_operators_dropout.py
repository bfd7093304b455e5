"""Dropout is turned off in modules of torch and in attributes that are known to be probabilities."""

import torch
from torch import nn

import peftcore
from peftcore.compat.configs import drop_nothing
from peftcore.contract.operators import turn_off_dropout
from peftcore.testing import HOSTS
from peftcore.testing.kit import fill


class Told(nn.Module):
    """A module with a probability of its own, below which another one drops."""

    def __init__(self) -> None:
        super().__init__()
        self.input_dropout, self.rate = 0.5, 0.5
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.LSTM(2, 2, num_layers=2, dropout=0.5))


def test_all_that_drops_below_a_module_is_turned_off() -> None:
    module = Told()
    assert turn_off_dropout(module)
    assert module.input_dropout == 0 and module.inner[0].p == 0 and module.inner[1].dropout == 0
    assert module.rate == 0.5  # nobody knows what that is
    module.train()
    x = torch.randn(3, 1, 2)
    torch.testing.assert_close(module.inner(x)[0], module.inner(x)[0], rtol=0, atol=0)


def test_what_drops_nothing_says_so() -> None:
    assert not turn_off_dropout(nn.Linear(2, 2))
    module = Told()
    turn_off_dropout(module)
    assert turn_off_dropout(module)  # its modules of torch are there, whoever turned them off
    assert not turn_off_dropout(module.inner[1])


def test_blocks_of_rotations_drop_nothing_then() -> None:
    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model, "oft", block_dropout=0.5, block_size=2)
    fill(injection, 0)
    model.train()
    assert not torch.equal(model(**inputs)["logits"], model(**inputs)["logits"])
    drop_nothing(injection)
    torch.testing.assert_close(model(**inputs)["logits"], model(**inputs)["logits"], rtol=0, atol=0)
