"""Pairs of answers, one of them preferred, in common file layouts: a prompt with two answers, or two whole
conversations with the same beginning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from peftcore.errors import BadInput
from peftcore_lab.data.conversations import SYSTEM, Message, answer_of, asked_in, begun, told
from peftcore_lab.data.example_sources import ExampleSource

PROMPTS = ("prompt", "question", "instruction")
"""Names of columns for prompts."""


@dataclass(frozen=True)
class PairColumns:
    """The columns with pairs. Without `prompt`, both answers are whole conversations."""

    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two answers to it, each as a list of messages. All messages of answers are from the assistant."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def pair_columns(there: Sequence[str], wanted: PairColumns, where: object) -> PairColumns:
    """Return the columns of a file: those that the user named, or the first columns with known names (in upper or lower
    case).

    Raises:
        BadInput: a column is missing.
    """
    given = [each for each in (wanted.prompt, wanted.chosen, wanted.rejected) if each is not None]
    if missing := [each for each in given if each not in there]:
        raise BadInput(f"{where}: no column {missing[0]!r}; its columns are {', '.join(there)}")
    known = {each.lower(): each for each in reversed(there)}
    chosen, rejected = wanted.chosen or known.get("chosen"), wanted.rejected or known.get("rejected")
    if chosen is None or rejected is None:
        raise BadInput(
            f"{where}: set data.chosen and data.rejected to the columns of the preferred and the rejected answers; its "
            f"columns are {', '.join(there)}"
        )
    prompt = wanted.prompt or next((known[name] for name in PROMPTS if name in known), None)
    return PairColumns(prompt, chosen, rejected)


def pairs(part: Dataset, chosen: PairColumns, where: ExampleSource) -> list[PreferencePair]:
    """Return the pairs of a table.

    Raises:
        BadInput: a row lacks a pair. The error names the row.
    """
    found = []
    for index, row in enumerate(part):
        try:
            found.append(_pair(row, chosen))
        except ValueError as error:
            raise BadInput(f"{where.row(index)}: {error}") from None
    return found


def _pair(row: Mapping[str, Any], columns: PairColumns) -> PreferencePair:
    values = [row[str(name)] for name in (columns.chosen, columns.rejected)]
    if columns.prompt is None:
        one, other = map(told, values)
        asked = one[: in_common(one, other)]
        answers = [each[len(asked) :] for each in (one, other)]
    else:
        asked = asked_in(row, columns.prompt)
        answers = [_after(asked, answer_of(value)) for value in values]
    if answers[0] == answers[1]:
        raise ValueError("the preferred answer and the other one are the same")
    if not any(message["content"] for message in asked if message["role"] != SYSTEM):
        raise ValueError("the preferred answer and the other one have no prompt in common")
    for name, answer in zip(("preferred", "other"), answers, strict=True):
        if not any(message["content"] or len(message) > 2 for message in answer):  # more than a role and no words
            raise ValueError(f"the {name} answer is empty")
        if any(message["role"] != "assistant" for message in answer):
            raise ValueError(f"the {name} answer has messages of another role than assistant; remove them")
    return PreferencePair([*([] if asked[0]["role"] == SYSTEM else begun(row)), *asked], *answers)


def in_common(*rows: Sequence[Any]) -> int:
    """Return the length of the common prefix of the lists."""
    alike = (all(each == first for each in rest) for first, *rest in zip(*rows, strict=False))
    return next((number for number, same in enumerate(alike) if not same), min(map(len, rows)))


def _after(asked: list[Message], answer: list[Message]) -> list[Message]:
    """Return an answer without the prompt. An answer that begins with the prompt is a whole conversation."""
    return answer[len(asked) :] if answer[: len(asked)] == asked else answer
