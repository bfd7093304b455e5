"""The task of conversations: the assistant's answers, given what came before."""

from __future__ import annotations

from typing import Any

from peftcore.comparing.data.columns import choose_column
from peftcore.comparing.data.sources import splits
from peftcore.comparing.errors import BadInput
from peftcore.comparing.models.loading import load_tokenizer
from peftcore.comparing.runs.run import Run
from peftcore.comparing.tasks._causal import CausalData, prepared
from peftcore.comparing.tasks.task import IGNORED, Prepared, Task

NAMES = ("messages", "conversation", "conversations", "chat")


class ChatData(CausalData):
    """Options of the data: a column of conversations, lists of ``{"role": "user" | "assistant" | "system", "content":
    "..."}``."""

    messages: str | None = None
    """Column of the conversations; guessed when left out."""


class Chat(Task[ChatData]):
    """The task, in which only the assistant's answers are learned and scored."""

    Data = ChatData
    metric = "perplexity"

    def prepare(self, run: Run, data: ChatData) -> Prepared:
        found = splits(data.train, data.held_out, data.held_out_size)
        column = choose_column(found.train.column_names, data.messages, NAMES, "messages", data.train)
        tokenizer = load_tokenizer(run.model)
        if not tokenizer.chat_template:
            raise BadInput(f"{run.model}: its tokenizer has no chat template; use the task causal-lm for plain text")
        parts = [[_encoded(row, tokenizer, data) for row in part[column]] for part in (found.train, found.held_out)]
        parts = [[row for row in part if any(label != IGNORED for label in row["labels"][1:])] for part in parts]
        if not all(parts):
            raise BadInput(f"{data.train}: no conversation has an answer within {data.max_length} tokens")
        prompts = [_rendered(tokenizer, [{"role": "user", "content": each}], True) for each in data.prompts]
        return prepared(run, data, tokenizer, parts[0], parts[1], prompts)


def _rendered(tokenizer: Any, messages: list[dict[str, str]], answering: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # a template raises what it likes
        raise BadInput(f"the chat template refuses {messages!r:.200}: {error}") from None
    return text


def _encoded(messages: list[dict[str, str]], tokenizer: Any, data: ChatData) -> dict[str, Any]:
    """Return the tokens of the whole conversation; those of answers, with the mark that ends each, are the labels."""
    text = _rendered(tokenizer, messages, False)
    answers = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = _rendered(tokenizer, messages[:index], True)
            told = _rendered(tokenizer, messages[: index + 1], False)
            if not (told.startswith(asked) and text.startswith(told)):
                raise BadInput("the chat template changes earlier turns, so answers cannot be told apart in one pass")
            answers.append((len(asked), len(told)))
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spoken = [any(start <= a and b <= end and a < b for start, end in answers) for a, b in read["offset_mapping"]]
    ids = read["input_ids"][: data.max_length]
    labels = [token if counts else IGNORED for token, counts in zip(ids, spoken, strict=False)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
