"""The task of plain text: the model learns to predict the next token."""

from __future__ import annotations

from typing import Any

from peftcore.errors import BadInput
from peftcore.models.loading import load_tokenizer
from peftcore.models.model_names import Use
from peftcore_lab.data.columns import TEXT_NAMES, choose_column
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks._causal import CausalData, prepared
from peftcore_lab.tasks.task import Prepared, Task


class CausalTextData(CausalData):
    """Options of the data: a column of texts."""

    text: str | None = None
    """Column of the texts. By default it is detected by its name."""


class CausalLM(Task[CausalTextData]):
    """The task, scored by perplexity."""

    Data = CausalTextData
    metric = "perplexity"
    use = Use.TEXT

    def prepare(self, run: Run, data: CausalTextData) -> Prepared:
        found = data.splits()
        column = choose_column(found.train.column_names, data.text, TEXT_NAMES, "text", data.train)
        tokenizer = load_tokenizer(run.model)
        parts = [_encoded(part, column, tokenizer, data) for part in (found.train, found.held_out)]
        if not all(parts):
            raise BadInput(
                f"{data.train}: every training text, or every held-out one, is shorter than two tokens: use longer "
                "texts"
            )
        return prepared(run, data, tokenizer, parts[0], parts[1], data.prompts, data.names(found))


def _encoded(part: Any, column: str, tokenizer: Any, data: CausalTextData) -> list[dict[str, Any]]:
    """Return the tokens of each text with an end token, cut at the maximum length. With packing, the rest of a longer
    text becomes further examples."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    part = part.select([row for row, text in enumerate(part[column]) if text])
    ids = [[*tokenizer(text)["input_ids"], *end] for text in part[column]]
    if data.pack:
        ids = [each[start : start + data.max_length] for each in ids for start in range(0, len(each), data.max_length)]
    cut = [each[: data.max_length] for each in ids]
    rows = [{"input_ids": each, "attention_mask": [1] * len(each), "labels": each} for each in cut]
    return [row for row in (rows if data.pack else data.told(rows, part)) if len(row["input_ids"]) > 1]
