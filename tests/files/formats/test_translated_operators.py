"""Operators as translations see them: those of the method, numbered by kind."""

from core_toys import perceptron, transformer

import peftcore
from peftcore.files.formats.translated_operators import places_of


def test_operators_are_numbered_and_know_their_options() -> None:
    overrides = {"layers.1.*": {"rank": 2}}
    injection = peftcore.apply(transformer(), "lora", target="q_proj", rank=4, overrides=overrides)
    first, second = places_of(injection)
    assert (first.index, second.index, first.count) == (0, 1, 2)
    assert (first.config.rank, second.config.rank) == (4, 2)
    assert second.site.path == "layers.1.self_attn.q_proj"
    assert second.operator is injection.operators[second.site.path]


def test_what_trains_along_is_none_of_the_methods() -> None:
    injection = peftcore.apply(perceptron(), "lora", target="first", train=["second"])
    assert [place.site.path for place in places_of(injection)] == ["first"]
