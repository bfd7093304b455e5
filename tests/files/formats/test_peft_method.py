"""How a method of ours and a type of peft say the same: what all types share."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.file_options import Keys
from peftcore.files.formats.peft_method import PeftMethod, peft_method, peft_methods
from peftcore.files.formats.translated_operators import Place, places_of

WHERE = Path("adapter_config.json")


class Toy(PeftMethod):
    methods = ("lora",)
    below = ("lora_A.weight",)
    kinds = (nn.Linear,)
    patterns: ClassVar = {"rank_pattern": "r"}

    def options(self, keys: Keys, shapes: Any) -> dict[str, Any]:
        return {}

    def read(self, place: Place, found: Any) -> dict[str, Any]:
        return {}

    def differs(self, place: Place) -> str:
        return "groups" if place.site.path == "1" else ""


def test_each_type_has_a_method_that_there_is() -> None:
    assert {"LORA", "IA3", "PROMPT_TUNING"} <= set(peft_methods())
    for kind in peft_methods():
        for name in peft_method(kind, WHERE).methods:
            assert peftcore.method(name).name == name


def test_a_type_that_nobody_reads_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: no installed plugin reads peft's NEW; they read"):
        peft_method("NEW", WHERE)


def test_the_first_pattern_that_matches_counts() -> None:
    keys = Keys({"rank_pattern": {"q_proj": 4, r".*proj": 2}}, WHERE)
    assert Toy().changes(keys, ["a.q_proj", "a.v_proj", "a.mlp"]) == {"a.q_proj": {"r": 4}, "a.v_proj": {"r": 2}}


def test_a_pattern_means_one_path_exactly_as_it_stands() -> None:
    assert Toy().pattern("a.b", []) == r"^a\.b"


@pytest.mark.parametrize("error", [CheckpointError, ExportError])
def test_places_where_peft_has_not_the_same_are_refused(error: type[Exception]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    first, second, convolution = places_of(peftcore.apply(model, "lora", target=["0", "1", "2"]))
    Toy().check(first, error)
    with pytest.raises(error, match="1: peft computes something else with groups"):
        Toy().check(second, error)
    with pytest.raises(error, match="2 is not a layer that peft adapts this way: Linear"):
        Toy().check(convolution, error)


class Adding(PeftMethod):
    """A type that adds an update's output."""

    methods = ("toy",)
    adds = True
    options = Toy.options
    read = Toy.read


def test_layers_where_an_added_output_is_another_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"))
    zeros, reflected = places_of(peftcore.apply(model, "lora", target=["0", "1"]))
    Adding().check(zeros, ExportError)
    with pytest.raises(ExportError, match="1: peft computes something else with padding_mode='reflect'"):
        Adding().check(reflected, ExportError)
