"""What `apply` is asked for: methods by name, config or class; the objects of the user are not touched."""

import copy
from typing import Any

import torch
from core_toys import (
    perceptron,
)

import peftcore


def config(name: str, **options: Any) -> Any:
    return peftcore.method(name).Config(**options)


def test_apply_takes_a_name_a_config_and_a_class() -> None:
    cls = peftcore.method("lora")
    ways = [
        peftcore.apply(perceptron(), "lora", target="first", seed=1, rank=3),
        peftcore.apply(perceptron(), config("lora", rank=3), target="first", seed=1),
        peftcore.apply(perceptron(), cls, target="first", seed=1, rank=3),
        peftcore.apply(perceptron(), "reparameterized/lora", target="first", seed=1, rank=3),
        peftcore.apply(perceptron(), config("lora"), target="first", seed=1, rank=3),
    ]
    for injection in ways:
        assert injection.config == config("lora", rank=3)
        assert torch.equal(injection.operators["first"].A, ways[0].operators["first"].A)


def test_the_users_objects_are_not_mutated() -> None:
    overrides = {"first": {"rank": 2}}
    made = config("lora", rank=3, overrides=overrides)
    kept, kept_overrides = made.model_dump(), copy.deepcopy(overrides)
    target, train = ["first"], ["second"]
    injection = peftcore.apply(perceptron(), made, target=target, train=train)
    injection.config.replace(rank=5)
    assert made.model_dump() == kept
    assert overrides == kept_overrides
    assert (target, train) == (["first"], ["second"])


def test_what_the_user_changes_later_does_not_reach_the_injection() -> None:
    overrides = {"first": {"rank": 2}}
    injection = peftcore.apply(perceptron(), "lora", target="first", rank=3, overrides=overrides)
    overrides["first"]["rank"] = 7
    assert injection.config.overrides == {"first": {"rank": 2}}
