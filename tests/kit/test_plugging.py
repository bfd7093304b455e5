"""Hooks that are tried out without a package."""

import pytest
from core_toys import Shift, perceptron
from torch import nn

import peftcore
from peftcore.author import Layer, Transposed, hookimpl
from peftcore.testing import plugged


@hookimpl
def peftcore_layer(module: nn.Module, tensor: str) -> Layer | None:
    """Says of every linear layer what is wrong: that its weight is stored the other way round."""
    return Transposed() if isinstance(module, nn.Linear) and tensor == "weight" else None


def shape() -> tuple[int, ...]:
    (site,) = peftcore.plan(perceptron(), Shift, target="first").sites
    return tuple(site.weight_shape)


def test_a_hook_answers_until_the_block_ends_also_by_an_error() -> None:
    as_ever = shape()
    with pytest.raises(ZeroDivisionError), plugged(peftcore_layer):
        assert shape() == as_ever[::-1]
        raise ZeroDivisionError
    assert shape() == as_ever
