"""Names of injections: which can be used, and when one is free."""

import pytest
from core_toys import (
    perceptron,
    snapshot,
)
from torch import nn

import peftcore
from peftcore.errors import (
    DuplicateInjection,
)


@pytest.mark.parametrize("name", ["with.dot", "", "."])
def test_names_that_cannot_be_used(name: str) -> None:
    model = perceptron()
    before = snapshot(model)
    with pytest.raises(DuplicateInjection, match="without dots"):
        peftcore.apply(model, "lora", target="first", name=name)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["train", "forward", "half", "weight", "state_dict"])
def test_names_that_modules_use_themselves_are_refused_or_harmless(name: str) -> None:
    model = perceptron()
    before = snapshot(model)
    try:
        peftcore.apply(model, "lora", target="first", name=name)
    except DuplicateInjection as error:
        assert repr(name) in str(error)
        assert snapshot(model) == before
    else:
        assert isinstance(model.get_submodule(f"peft.first.{name}"), nn.Module)


def test_name_that_is_taken() -> None:
    model = perceptron()
    peftcore.apply(model, "lora", target="first")
    before = snapshot(model)
    with pytest.raises(DuplicateInjection, match="already has"):
        peftcore.apply(model, "lora", target="second")
    assert snapshot(model) == before


def test_name_is_free_again_after_remove() -> None:
    model = perceptron()
    for _ in range(3):
        peftcore.apply(model, "lora", target="first").remove()
    assert peftcore.apply(model, "lora", target="first").name == "lora"
