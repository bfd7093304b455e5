"""Conversations in common file layouts: messages, ShareGPT, Alpaca, prompt and completion.

All are converted to lists of ``{"role": "system" | "user" | "assistant" | "tool", "content": "..."}``, the input of
chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from peftcore.errors import BadInput, shown
from peftcore_lab.data.example_sources import ExampleSource

Message = dict[str, Any]
LISTS = ("messages", "conversations", "conversation", "chat")
"""Names of columns with one list for each conversation."""
PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer")),
    *(("instruction", "output"), ("instruction", "response")),
)
"""Names of columns for prompts and answers."""
INPUT, SYSTEM, HISTORY = "input", "system", "history"
"""Further columns of files in the layout of Alpaca: the input of the instruction, the system message, and the earlier
turns."""
ROLES: Mapping[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""Roles of chat templates, by their names in files."""


@dataclass(frozen=True)
class Columns:
    """The columns with conversations: one column with lists of messages, or one with prompts and one with answers."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None


def columns(there: Sequence[str], wanted: Columns, where: object) -> Columns:
    """Return the columns of a file: those that the user named, or the first columns with known names (in upper or lower
    case).

    Raises:
        BadInput: the columns, or one column of a pair, are missing.
    """
    given = [each for each in (wanted.messages, wanted.prompt, wanted.completion) if each is not None]
    if missing := [each for each in given if each not in there]:
        raise BadInput(f"{where}: no column {missing[0]!r}; its columns are {', '.join(there)}")
    if wanted.messages is not None:
        if len(given) > 1:
            raise BadInput("data.messages is a column of whole conversations: remove data.prompt and data.completion")
        return wanted
    known = {each.lower(): each for each in reversed(there)}
    if not given:
        for name in LISTS:
            if name in known:
                return Columns(messages=known[name])
    for prompt, completion in PAIRS:
        pair = Columns(None, wanted.prompt or known.get(prompt), wanted.completion or known.get(completion))
        if pair.prompt is not None and pair.completion is not None:
            return pair
    raise BadInput(
        f"{where}: set data.messages to the column of conversations, or data.prompt and data.completion to the columns "
        f"of questions and answers; its columns are {', '.join(there)}"
    )


def conversations(part: Dataset, chosen: Columns, where: ExampleSource) -> list[list[Message]]:
    """Return the conversations of a table.

    Raises:
        BadInput: a row lacks a conversation. The error names the row.
    """
    found = []
    for index, row in enumerate(part):
        try:
            found.append(_of_list(row, chosen.messages) if chosen.messages else _of_pair(row, chosen))
        except ValueError as error:
            raise BadInput(f"{where.row(index)}: {error}") from None
    return found


def _of_list(row: Mapping[str, Any], column: str) -> list[Message]:
    messages = told(row[column])
    return [*begun(row), *messages] if messages[0]["role"] != SYSTEM else messages


def _of_pair(row: Mapping[str, Any], chosen: Columns) -> list[Message]:
    """Return the conversation of a row with a prompt and its completion. Both may be lists of messages, and the row may
    be in the layout of Alpaca."""
    return [*begun(row), *asked_in(row, str(chosen.prompt)), *answer_of(row[str(chosen.completion)])]


def asked_in(row: Mapping[str, Any], column: str) -> list[Message]:
    """Return the messages of a prompt. A text becomes one message of the user, together with the instruction's input,
    if there is one.

    Raises:
        ValueError: the value is neither a text nor a list of messages.
    """
    prompt, about = row[column], row.get(INPUT) if column != INPUT else None
    if isinstance(prompt, str):
        return [{"role": "user", "content": f"{prompt}\n\n{about}" if about else prompt}]
    return told(prompt)


def answer_of(value: Any) -> list[Message]:
    """Return the messages of an answer. A text becomes one message of the assistant.

    Raises:
        ValueError: the value is neither a text nor a list of messages.
    """
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else told(value)


def told(value: Any) -> list[Message]:
    """Return the messages of a list, or of a list in JSON, with the roles of chat templates.

    Raises:
        ValueError: the value is not a list of messages, or is empty.
    """
    return _messages(_listed(value))


def begun(row: Mapping[str, Any]) -> list[Message]:
    """Return the system message and the earlier turns, if they are in separate columns."""
    found = [{"role": SYSTEM, "content": row[SYSTEM]}] if row.get(SYSTEM) else []
    for asked, answered in row.get(HISTORY) or ():
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return found


def _listed(value: Any) -> list[Any]:
    """Return a list of messages, which may be a JSON text in a table of texts.

    Raises:
        ValueError: the value is not a list of messages, or is empty.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"{shown(value)} is neither a list of messages nor such a list as JSON") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"{shown(value)} is not a list of messages")
    return value


def _messages(entries: Sequence[Any]) -> list[Message]:
    """Return messages with the roles of chat templates. Other keys of an entry, such as tool calls, are kept."""
    found = []
    for entry in entries:
        held = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, dict) else {}
        role, content = ("from", "value") if "from" in held else ("role", "content")
        if not isinstance(held.get(role), str):
            raise ValueError(f"the message {shown(entry)} needs the keys role and content, or from and value")
        if held[role].lower() not in ROLES:
            raise ValueError(f"the role {shown(held[role])} is not one of {', '.join(ROLES)}")
        message = {"role": ROLES[held.pop(role).lower()], "content": held.pop(content, "")}
        found.append({**message, **held})
    return found
