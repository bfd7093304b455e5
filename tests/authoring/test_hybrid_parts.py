"""Methods that are made of methods: how a part is written, and what is handed on to it."""

from typing import Any

import pytest
import torch
from core_toys import perceptron
from torch import Tensor

import peftcore
from peftcore.authoring.hybrid_parts import OfParts, options_of
from peftcore.errors import ConfigError, UnknownMethod


def test_a_part_is_its_options_with_its_name() -> None:
    assert options_of({"method": "lora", "rank": 3, "target": "first"}) == peftcore.method("lora").Config(rank=3)


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ({"rank": 3}, ConfigError, 'has no "method"'),
        ({"method": 3}, ConfigError, 'has no "method"'),
        ({"method": "lora", "rank": -1}, ConfigError, "rank"),
        ({"method": "lora", "no_option": 1}, ConfigError, "no_option"),
        ({"method": "no_method"}, UnknownMethod, "no_method"),
    ],
)
def test_what_is_no_part_is_named(part: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        options_of(part)


@pytest.mark.parametrize(("name", "more"), [("aux_loss", ()), ("output_loss", ("an output", "a call"))])
def test_losses_of_parts_are_added_and_none_is_none(
    name: str, more: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    injection = peftcore.apply(perceptron(), ["lora", "vera"], target="first")
    loss = getattr(OfParts(), name)
    assert loss(injection, *more) is None
    given: dict[str, Tensor | None] = {"lora": torch.tensor(2.0), "vera": None}

    def own(self: Any, injection: Any, *seen: Any) -> Tensor | None:
        assert seen == more
        return given[self.name]

    for part in injection.parts.values():
        monkeypatch.setattr(type(part.method), name, own)
    assert loss(injection, *more) == 2.0
    given["vera"] = torch.tensor(3.0)
    assert loss(injection, *more) == 5.0


def test_groups_are_those_of_all_parts() -> None:
    injection = peftcore.apply(perceptron(), [{"method": "lora_plus", "ratio": 4.0}, "ia3"], target="first")
    groups = OfParts().parameter_groups(injection, lr=0.5)
    assert {group["lr"] for group in groups} == {0.5, 2.0}
    assert sum(len(group["params"]) for group in groups) == len(list(injection.parameters()))
