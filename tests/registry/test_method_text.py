"""The description of a method is divided at four headings, and a description without them is one part."""

import pytest

import peftcore
from peftcore.registry.method_text import HEADINGS, sections, text_of

TEXT = """One method.   Somebody 2024.

It leaves something out.

Equation:
    y = W x

W is a matrix.

Start: zero,
the identity.

Use it: Equation: is no heading inside a line."""


def test_sections_by_heading() -> None:
    assert sections(TEXT) == {
        "": "One method.   Somebody 2024.\n\nIt leaves something out.",
        "Equation": "    y = W x\n\nW is a matrix.",
        "Start": "zero,\nthe identity.",
        "Use it": "Equation: is no heading inside a line.",
    }
    assert tuple(each for each in sections(TEXT) if each) == (HEADINGS[0], HEADINGS[1], HEADINGS[3])


@pytest.mark.parametrize("text", ["", "One line.", "    Equation: set in\nIn the Start: nothing"])
def test_a_text_without_headings_is_one_part(text: str) -> None:
    assert sections(text) == {"": text}


def test_the_text_is_that_of_the_module() -> None:
    assert text_of(peftcore.method("lora")).startswith("LoRA: low-rank adaptation.")
    assert text_of(peftcore.method("rslora")) == text_of(peftcore.method("lora"))
