"""What a checkpoint says of its adapter, held against the adapter that goes on."""

import json
from typing import Any

import pytest
import torch
from fleet_toys import applied, llama

import peftcore
from peftcore.errors import CheckpointError
from peftcore.files.continuing import NAMED, base_sample, check_record, differences, listed, record_of


def test_differences_are_named_by_their_place() -> None:
    held = {"training": {"steps": 4, "rate": 0.1}, "data": ["a"], "gone": 1, "same": None}
    here = {"training": {"steps": 8, "rate": 0.1}, "data": ["b"], "new": {"x": 1}}
    assert differences(held, here) == [
        "training.steps was 4 and is 8",
        "data was ['a'] and is ['b']",
        "gone was 1 and is None",
        "new was None and is {'x': 1}",
    ]
    assert differences(held, json.loads(json.dumps(held))) == []
    assert listed(["x"] * (NAMED + 2)).endswith("x; and 2 more") and listed(["x", "y"]) == "x; y"


@pytest.mark.parametrize("method", ["lora", "adalora", "hra", "bitfit", "prompt_tuning", "vera"])
def test_an_adapter_is_like_itself_applied_again(method: str) -> None:
    """Whatever its values are by now: methods on weights, on biases, in front of the text."""
    injection = applied(llama(attention_bias=True), method, "a")
    record = json.loads(json.dumps(record_of(injection)))
    check_record(record, applied(llama(attention_bias=True), method, "b", seed=3), "here")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 99}, "alpha was 8.0 and is 99.0"),
        ({"dtype": torch.float32}, "dtype was 'float64' and is 'float32'"),
        ({"train": ["lm_head"]}, "train was .* and is .*lm_head"),
        ({"overrides": {"*.0.*": {"rank": 2}}}, "overrides"),
        ({"exclude": "*.1.*"}, "2 are missing, such as model.layers.1.self_attn.q_proj"),
        ({"target": "all-linear"}, "target modules: 10 are new"),
    ],
    ids=str,
)
def test_what_differs_is_named(options: dict[str, Any], words: str) -> None:
    record = record_of(applied(llama(), "lora", "a"))
    other = peftcore.apply(llama(), "lora", **{"dtype": torch.float64, **options})
    with pytest.raises(CheckpointError, match=f"here belongs to another adapter than 'lora': .*{words}"):
        check_record(record, other, "here")


def test_the_base_is_told_apart_by_its_values_where_it_is_frozen() -> None:
    model = llama()
    injection = applied(model, "lora", "a")
    record, weight = record_of(injection), model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight.mul_(1.01)
    with pytest.raises(CheckpointError, match="weights of the base have other values"):
        check_record(record, injection, "here")
    sample = base_sample(injection.sites)
    weight.requires_grad_(True)  # it trains, so its values say nothing
    other = base_sample(injection.sites)
    assert sample != other is not None
    with torch.no_grad():
        weight.mul_(1.01)
    assert base_sample(injection.sites) == other
    assert base_sample([]) is None
