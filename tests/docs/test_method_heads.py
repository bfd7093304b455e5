"""A page of a method that leaves out parts of its paper begins with what these are."""

import inspect
import sys

import pytest

import peftcore


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lst", "a ladder in the encoder"),
        ("lst", "rows of the model that pruning finds important"),
        ("side_tuning", "pictures, for which the authors' side networks are convolutions, are not here"),
        ("text_to_lora", "the largest of the paper's three networks"),
    ],
)
def test_what_is_left_out_stands_in_front_of_the_equation(name: str, words: str) -> None:
    text = inspect.cleandoc(sys.modules[peftcore.method(name).__module__].__doc__ or "")
    assert words in " ".join(text.partition("\n    ")[0].split())
