"""``peftcore schema train``: what the file of a run may hold, each key with a description."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore_lab.tasks.task_catalogue import places

RUN = {
    "model": "m",
    "task": "chat",
    "data": {"train": "talks.json", "pack": True},
    "method": {"name": "dora", "rank": 8},
}


def schema(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["schema", *arguments])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def keys(part: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property anywhere in a schema, with its place."""
    if isinstance(part, list):
        for number, each in enumerate(part):
            yield from keys(each, f"{where}.{number}")
    elif isinstance(part, dict):
        for name, each in part.get("properties", {}).items() if isinstance(part.get("properties"), dict) else ():
            if "const" not in each or len(each) > 1:  # the condition of a rule
                yield f"{where}.{name}", each
        for name, each in part.items():
            if name != "if":
                yield from keys(each, f"{where}.{name}")


@pytest.mark.parametrize("command", ["train", "compare", "search"])
def test_every_key_is_described(command: str) -> None:
    found = schema(command)
    jsonschema.Draft202012Validator.check_schema(found)
    listed = [
        (place, each) for place, each in keys(found, command) if not place.endswith(".data") or ".then" not in place
    ]
    assert len(listed) > 200
    assert [place for place, each in listed if "description" not in each and "$ref" not in each] == []


def test_the_schema_says_what_the_file_may_hold() -> None:
    check = jsonschema.Draft202012Validator(schema("train"))
    check.validate(RUN)
    check.validate({**RUN, "method": "lora", "training": {"steps": 3}})
    for wrong in (
        {"task": "chats"},
        {"data": {"train": "x", "label": "chat has no such column"}},
        {"data": {}},
        {"method": {"name": "dora", "rank": 0}},
        {"method": {"rank": 8}},
        {"training": {"steps": 0}},
        {"other": 1},
    ):
        assert not check.is_valid({**RUN, **wrong}), wrong
    assert set(check.schema["properties"]["task"]["enum"]) == set(places())


def test_all_methods_are_among_the_names() -> None:
    choice = schema("compare")["$defs"]["Candidate"]["anyOf"][1]
    assert {info.name for info in peftcore.methods(presets=True)} | {"full"} == set(
        choice["properties"]["name"]["examples"]
    )
