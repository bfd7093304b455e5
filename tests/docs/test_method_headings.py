"""The docstring of each method has the four headings, in their order, each with a text; calls in it are valid."""

import ast
import re

import pytest

import peftcore
from peftcore.cli.inspection.show import MethodDescription
from peftcore.registry.method_text import HEADINGS, sections

PLUGINS = {"additive", "diffusion", "hybrid", "multitask", "quantized", "reparameterized", "selective", "vision"}
METHODS = [MethodDescription.of(f"{info.plugin}/{info.name}") for info in peftcore.methods() if info.plugin in PLUGINS]
CALL = re.compile(r"`(peftcore\.apply\(.*?\))`", re.DOTALL)


def lacks(text: str) -> bool:
    """Whether a text lacks a heading, or has one without a text, or has them in another order."""
    found = sections(text)
    return tuple(found) != ("", *HEADINGS) or not all(found.values())


def test_each_method_has_the_headings() -> None:
    lacking = [f"{each.info.plugin}/{each.info.name}" for each in METHODS if lacks(each.text)]
    assert len(METHODS) > 170 and not lacking, f"write the headings {', '.join(HEADINGS)}, each with a text: {lacking}"


@pytest.mark.parametrize(
    "text",
    [
        "A title.",
        "A title.\n\nEquation:\n    y = x\n\nStart: zero.\n\nUse it: first.",
        "A title.\n\nStart: zero.\n\nEquation:\n    y = x\n\nDiffers from the authors' code: no.\n\nUse it: first.",
        "A title.\n\nEquation:\n    y = x\n\nStart:\n\nDiffers from the authors' code: no.\n\nUse it: first.",
    ],
)
def test_a_text_that_lacks_a_heading(text: str) -> None:
    assert lacks(text)


def test_calls_have_options_that_exist() -> None:
    for method in METHODS:
        for call in CALL.findall(method.text):
            node = ast.parse(" ".join(call.split()), mode="eval").body
            assert isinstance(node, ast.Call)
            name = ast.literal_eval(node.args[1])
            found = peftcore.method(name)
            options = {each.arg for each in node.keywords} - {"target", "exclude", "train", "data", "seed", "dtype"}
            assert options <= found.Config.model_fields.keys(), f"{method.info.name}: {call}"
