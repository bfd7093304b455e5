"""Pairs of answers say the same in all shapes in which people keep them; what is no pair is refused by its number."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from peftcore.errors import BadInput
from peftcore_lab.data.example_sources import ExampleSource, read
from peftcore_lab.data.preferences import PairColumns, PreferencePair, in_common, pair_columns, pairs

ASKED = [{"role": "user", "content": "Name a colour"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("red", "Great question! Red."))
SHARED = [{"from": "human", "value": "Name a colour"}]
SHAPES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Name a colour", "chosen": "red", "rejected": "Great question! Red."},
    "messages": {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
    "a text and messages": {"prompt": "Name a colour", "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
    "a prompt and whole conversations": {
        "prompt": "Name a colour",
        "chosen": [*ASKED, GOOD],
        "rejected": [*ASKED, BAD],
    },
    "sharegpt": {
        "chosen": [*SHARED, {"from": "gpt", "value": "red"}],
        "rejected": [*SHARED, {"from": "gpt", "value": "Great question! Red."}],
    },
    "other columns": {"Question": "Name a colour", "Chosen": "red", "REJECTED": "Great question! Red."},
    "JSON in a table": {"chosen": json.dumps([*ASKED, GOOD]), "rejected": json.dumps([*ASKED, BAD])},
}


def found(rows: list[dict[str, Any]], **wanted: Any) -> list[PreferencePair]:
    part = Dataset.from_list(rows)
    return pairs(
        part, pair_columns(part.column_names, PairColumns(**wanted), "pairs.jsonl"), ExampleSource("pairs.jsonl")
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes(shape: str) -> None:
    assert found([SHAPES[shape]]) == [PreferencePair(ASKED, [GOOD], [BAD])]


def test_from_a_file_with_named_columns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("q,yes,no\nName a colour,red,Great question! Red.\n", encoding="utf-8")
    part = read(str(path))
    assert isinstance(part, Dataset)
    columns = pair_columns(part.column_names, PairColumns("q", "yes", "no"), path)
    assert pairs(part, columns, ExampleSource("pairs.csv")) == [PreferencePair(ASKED, [GOOD], [BAD])]


def test_what_was_said_before() -> None:
    """A system's message and earlier turns in columns of their own, and what an instruction is about."""
    row = {"chosen": "3", "rejected": "4", "history": [["Hi", "Hello"]], "system": "Be brief"}
    pair = found([{"instruction": "Add", "input": "1 and 2", **row}])[0]
    assert [(each["role"], each["content"]) for each in pair.prompt] == [
        ("system", "Be brief"),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add\n\n1 and 2"),
    ]


TEXTS = SHAPES["texts"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**TEXTS, "rejected": "red"}, "are the same"),
        ({**TEXTS, "rejected": ""}, "the other answer is empty"),
        ({**TEXTS, "chosen": ""}, "the preferred answer is empty"),
        ({**TEXTS, "chosen": None}, "is not a list of messages"),
        ({**TEXTS, "prompt": None}, "is not a list of messages"),
        ({**TEXTS, "prompt": ""}, "no prompt in common"),
    ],
    ids=str,
)
def test_texts_that_are_no_pair(row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=rf"^pairs\.jsonl, row 2: .*{words}"):
        found([TEXTS, row])


OTHER = {"role": "user", "content": "Name a bird"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": [*ASKED, GOOD], "rejected": [*ASKED, GOOD]}, "are the same"),
        ({"chosen": [*ASKED, GOOD], "rejected": [OTHER, GOOD]}, "no prompt in common"),
        ({"chosen": [*ASKED, GOOD], "rejected": ASKED}, "the other answer is empty"),
        ({"chosen": [*ASKED, GOOD, OTHER], "rejected": [*ASKED, BAD, OTHER]}, "another role than assistant"),
        ({"chosen": [*ASKED, {"role": "judge", "content": "red"}], "rejected": [*ASKED, BAD]}, "the role 'judge'"),
    ],
    ids=["same", "other prompt", "no answer", "goes on", "role"],
)
def test_conversations_that_are_no_pair(row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=rf"^pairs\.jsonl, row 2: .*{words}"):
        found([SHAPES["whole conversations"], row])


def test_columns_that_are_missing() -> None:
    with pytest.raises(BadInput, match=r"set data\.chosen and data\.rejected to the columns"):
        found([{"prompt": "a", "chosen": "b"}])
    with pytest.raises(BadInput, match="no column 'asked'; its columns are prompt, chosen, rejected"):
        found([TEXTS], prompt="asked")
    with pytest.raises(BadInput, match=r"row 1: 'red' is neither a list of messages"):
        found([{"chosen": "red", "rejected": "blue"}])


def test_what_rows_have_in_common() -> None:
    assert in_common([1, 2, 3], [1, 2, 4], [1, 2, 3, 4]) == 2
    assert in_common([1, 2], [1, 2, 4]) == 2
    assert in_common([1], [2]) == 0
