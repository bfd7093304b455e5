"""What a method put in: the same to read of an injection and of a part of a hybrid, which has no verbs of its own."""

from pathlib import Path
from typing import Any, get_type_hints

import pytest
from core_toys import perceptron

import peftcore
from peftcore import Injection
from peftcore.author import HybridPart

READ = {"name", "model", "method", "config", "grafts", "operators", "sites", "shared", "parts", "whole", "family",
        "modules", "parameters", "reads_tokens", "state_dict", "steps_taken"}  # fmt: skip
"""All that a part has."""

LORA: dict[str, Any] = {"method": "lora", "rank": 2, "target": ["first", "second"]}
VERA: dict[str, Any] = {"method": "vera", "rank": 2, "target": ["first", "second"]}
NESTED: list[Any] = [{"method": "config_union", "parts": [VERA, {"method": "bitfit", "target": "first"}]}, LORA]


def test_a_part_is_read_and_has_no_verbs(tmp_path: Path) -> None:
    injection = peftcore.apply(perceptron(), [LORA, VERA])
    part = injection.parts["0"]
    assert type(part) is HybridPart and not isinstance(part, Injection)
    assert {name for name in dir(part) if not name.startswith("_")} == READ
    assert get_type_hints(HybridPart.parts.fget)["return"] == dict[str, HybridPart]
    with pytest.raises(AttributeError, match="'HybridPart' object has no attribute 'merge'"):
        part.merge()  # type: ignore[attr-defined]
    part.whole.save(tmp_path)
    part.whole.merge()
    assert injection.merged
    assert repr(part) == "HybridPart('0' of 'config_union': lora, 2 sites)"


@pytest.mark.parametrize("options", [LORA, VERA], ids=lambda options: options["method"])
def test_a_part_names_things_as_if_applied_by_itself(options: dict[str, Any]) -> None:
    alone = peftcore.apply(perceptron(), "config_union", parts=[options]).parts["0"]
    single = peftcore.apply(perceptron(), options["method"], rank=2, target=options["target"])
    inner = peftcore.apply(perceptron(), NESTED)
    within = inner.parts["1"] if options is LORA else inner.parts["0"].parts["0"]
    for part in (alone, within):
        assert list(part.operators) == [site.path for site in part.sites] == list(single.operators)
        assert part.shared.keys() == single.shared.keys()
        assert part.state_dict().keys() == single.state_dict().keys()
        assert [p.shape for p in part.parameters()] == [p.shape for p in single.parameters()]


def test_parts_of_parts_belong_to_one_injection() -> None:
    injection = peftcore.apply(perceptron(), NESTED)
    family = list(injection.family())
    assert [(each.name, each.method.name) for each in family] == [
        ("config_union", "config_union"), ("0", "config_union"), ("0", "vera"), ("1", "bitfit"), ("1", "lora")
    ]  # fmt: skip
    assert all(each.whole is injection for each in family)
    assert list(injection.parts["0"].operators) == ["0/first", "0/second", "1/first.bias"]
    assert list(injection.operators) == ["0/0/first", "0/0/second", "0/1/first.bias", "1/first", "1/second"]
    owners = [injection.owner(graft) for graft in injection.grafts]
    assert [each.method.name for each in owners] == ["vera", "vera", "bitfit", "lora", "lora"]


def test_a_part_is_frozen_by_its_parameters() -> None:
    injection = peftcore.apply(perceptron(), [LORA, VERA])
    for parameter in injection.parts["0"].parameters():
        parameter.requires_grad_(False)
    training = {key.split("/")[0] for key, operator in injection.operators.items()
                if any(parameter.requires_grad for parameter in operator.parameters())}  # fmt: skip
    assert training == {"1"}
