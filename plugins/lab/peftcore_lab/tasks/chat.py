"""The task of conversations: the model learns the assistant's answers, given the earlier messages."""

from __future__ import annotations

from typing import Any

from peftcore.errors import BadInput
from peftcore.models.loading import load_tokenizer
from peftcore.models.model_names import Use
from peftcore_lab.data.conversations import Columns, Message, columns, conversations
from peftcore_lab.data.templates import rendered, with_template
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks._causal import CausalData, prepared
from peftcore_lab.tasks.task import IGNORED, Prepared, Task


class ChatData(CausalData):
    """Options of the data: a column of conversations (messages or ShareGPT), or columns of prompts and answers
    (Alpaca, prompt and completion)."""

    messages: str | None = None
    """Column of whole conversations: lists of ``{"role": ..., "content": ...}`` or ``{"from": ..., "value": ...}``. By
    default it is detected by its name."""
    prompt: str | None = None
    """Column of prompts: texts or messages. By default it is detected by its name."""
    completion: str | None = None
    """Column of answers: texts or messages. By default it is detected by its name."""
    chat_template: str | None = None
    """A file with a Jinja template, or ``chatml``, instead of the tokenizer's template."""


class Chat(Task[ChatData]):
    """The chat task, in which only the assistant's answers are learned and scored."""

    Data = ChatData
    metric = "perplexity"
    use = Use.TEXT

    def prepare(self, run: Run, data: ChatData) -> Prepared:
        found = data.splits()
        tokenizer = with_template(load_tokenizer(run.model), data.chat_template, run.model)
        wanted = Columns(data.messages, data.prompt, data.completion)
        talks = [conversations(part, columns(part.column_names, wanted, name), name) for name, part in found.named]
        parts = [
            data.told([_encoded(talk, tokenizer, data) for talk in part], piece)
            for part, (_, piece) in zip(talks, found.named, strict=True)
        ]
        parts = [[row for row in part if any(label != IGNORED for label in row["labels"][1:])] for part in parts]
        if not all(parts):
            raise BadInput(
                f"{data.train}: no conversation has an answer within {data.max_length} tokens: raise data.max_length"
            )
        prompts = [rendered(tokenizer, [{"role": "user", "content": each}], True) for each in data.prompts]
        return prepared(run, data, tokenizer, parts[0], parts[1], prompts, data.names(found))


def _encoded(messages: list[Message], tokenizer: Any, data: ChatData) -> dict[str, Any]:
    """Return the tokens of the whole conversation. Only tokens of answers, including the end marks of answers, have
    labels."""
    text = rendered(tokenizer, messages, False)
    answers = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = rendered(tokenizer, messages[:index], True)
            told = rendered(tokenizer, messages[: index + 1], False)
            if not (told.startswith(asked) and text.startswith(told)):
                raise BadInput(
                    "the chat template changes earlier turns, so the tokens of answers cannot be found in one pass: "
                    "set another data.chat_template"
                )
            answers.append((len(asked), len(told)))
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spoken = [any(start <= a and b <= end and a < b for start, end in answers) for a, b in read["offset_mapping"]]
    ids = read["input_ids"][: data.max_length]
    labels = [token if counts else IGNORED for token, counts in zip(ids, spoken, strict=False)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
