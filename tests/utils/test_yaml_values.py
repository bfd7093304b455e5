"""Values are read as YAML, of plain values only."""

from typing import Any

import pytest

from peftcore.errors import BadInput
from peftcore.utils.yaml_values import parse


@pytest.mark.parametrize(
    ("text", "value"),
    [("16", 16), ("true", True), ("[1, 2]", [1, 2]), ("1e-3", 1e-3), ("5E4", 5e4), ("a text", "a text"), ("e3", "e3")],
)
def test_values(text: str, value: Any) -> None:
    found = parse(text, "--set x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["[1", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_plain_yaml_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--set x: not YAML"):
        parse(text, "--set x")
