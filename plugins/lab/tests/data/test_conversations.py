"""Conversations say the same in all shapes in which people keep them."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from peftcore.errors import BadInput
from peftcore_lab.data.conversations import Columns, columns, conversations
from peftcore_lab.data.example_sources import ExampleSource, read

EXPECTED = [
    [{"role": "user", "content": "Add 1 and 2"}, {"role": "assistant", "content": "3"}],
    [{"role": "user", "content": "Name a colour"}, {"role": "assistant", "content": "red"}],
]
SHAPES: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": talk} for talk in EXPECTED],
    "sharegpt": [
        {"id": "a", "conversations": [{"from": "human", "value": "Add 1 and 2"}, {"from": "gpt", "value": "3"}]},
        {"id": "b", "conversations": [{"from": "human", "value": "Name a colour"}, {"from": "gpt", "value": "red"}]},
    ],
    "alpaca": [
        {"instruction": "Add 1 and 2", "input": "", "output": "3"},
        {"instruction": "Name a colour", "input": None, "output": "red"},
    ],
    "prompt and completion": [{"prompt": talk[0]["content"], "completion": talk[1]["content"]} for talk in EXPECTED],
    "prompt and completion of messages": [{"prompt": talk[:1], "completion": talk[1:]} for talk in EXPECTED],
    "other columns": [{"Question": talk[0]["content"], "Answer": talk[1]["content"]} for talk in EXPECTED],
}


def found(source: Path | str, **wanted: Any) -> list[list[dict[str, Any]]]:
    part = read(str(source))
    assert isinstance(part, Dataset)
    return conversations(part, columns(part.column_names, Columns(**wanted), source), ExampleSource(str(source)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".parquet", "saved"])
def test_all_shapes_in_all_files(shape: str, kind: str, tmp_path: Path) -> None:
    rows, path = SHAPES[shape], tmp_path / f"talks{kind}"
    if kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif kind == ".csv":
        if shape == "prompt and completion of messages":
            pytest.skip("a text in a table is a text, and no list")
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(
                {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
                for row in rows
            )
    elif kind == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    assert found(path) == EXPECTED


def test_what_stands_in_columns_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    row = {"instruction": "Translate", "input": "Haus", "output": "house", "system": "Be short.",
           "history": [["Hello", "Hi"]]}  # fmt: skip
    path.write_text(json.dumps({"data": [row]}), encoding="utf-8")
    said = [(each["role"], each["content"]) for each in found(path)[0]]
    assert said == [
        ("system", "Be short."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Translate\n\nHaus"),
        ("assistant", "house"),
    ]  # fmt: skip


def test_roles_and_calls_of_tools(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    calls = [{"type": "function", "function": {"name": "now", "arguments": "{}"}}]
    talk = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "function", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
    ]
    path.write_text(json.dumps({"conversation": talk}), encoding="utf-8")
    [messages] = found(path)
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"] == calls and "tool_calls" not in messages[1]


def test_columns_that_are_named(tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    rows = [{"messages": "no talk", "ask": talk[0]["content"], "say": talk[1]["content"]} for talk in EXPECTED]
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert found(path, prompt="ask", completion="say") == EXPECTED
    with pytest.raises(BadInput, match="no column 'sya'; its columns are messages, ask, say"):
        found(path, prompt="ask", completion="sya")
    with pytest.raises(BadInput, match=r"remove data\.prompt"):
        found(path, messages="messages", prompt="ask")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": []}, "row 1: .* is not a list of messages"),
        ({"messages": "hello"}, "row 1: 'hello' is neither a list of messages nor such a list as JSON"),
        ({"messages": [{"role": "user"}, {"content": "x"}]}, "row 1: the message .* needs the keys role and content"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "row 1: the role 'narrator' is not one of system"),
        ({"messages": [1, 2]}, "row 1: the message 1 needs the keys role"),
        ({"text": "x"}, "set data.messages to the column of conversations, or data.prompt"),
        ({"prompt": "x"}, "its columns are prompt"),
    ],
)  # fmt: skip
def test_what_is_no_conversation(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(BadInput, match=told):
        found(path)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"a": [{}], "b": [{}]}', "3", '[{"a": 1}, {"a": [2]}]'])
def test_json_that_is_no_table(text: str, tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=r"talks\.json"):
        read(str(path))


def test_lines_of_json_under_the_other_name(tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    path.write_text("\n".join(map(json.dumps, SHAPES["messages"])), encoding="utf-8")
    assert found(path) == EXPECTED
