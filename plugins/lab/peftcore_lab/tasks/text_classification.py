"""The text classification task: a head on any encoder or decoder."""

from __future__ import annotations

from typing import Any

import transformers
from pydantic import PositiveInt

from peftcore.models.loading import classifier, load_tokenizer
from peftcore.models.model_names import Use
from peftcore_lab.data.columns import LABEL_NAMES, TEXT_NAMES, choose_column
from peftcore_lab.data.texts import Example, encode, make_task
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks._classes import accuracy, learned, predictions
from peftcore_lab.tasks.task import Prepared, RowsOfTasks, Task


class TextData(RowsOfTasks):
    """Options of the data: a column of texts, and one of classes."""

    text: str | None = None
    """Column of the texts. By default it is detected by its name."""
    label: str | None = None
    """Column of the classes. By default it is detected by its name."""
    max_length: PositiveInt = 128
    """Maximum number of tokens of a text; longer texts are cut."""


class TextClassification(Task[TextData]):
    """The task, scored by accuracy."""

    Data = TextData
    metric, greater = "accuracy", True
    use = Use.TEXT

    def prepare(self, run: Run, data: TextData) -> Prepared:
        found = data.splits()
        text = choose_column(found.train.column_names, data.text, TEXT_NAMES, "text", data.train)
        label = choose_column(found.train.column_names, data.label, LABEL_NAMES, "label", data.train)
        kept = [_complete(part, text, label) for part in (found.train, found.held_out)]
        examples, scored = (_examples(part, text, label) for part in kept)
        task = make_task(data.train, examples, scored, learned(run))
        tokenizer = load_tokenizer(run.model)
        parts = (task.train, task.held_out)
        train, held_out = (
            data.told(encode(tokenizer, part, task.labels, data.max_length), rows)
            for part, rows in zip(parts, kept, strict=True)
        )
        model, head = classifier(
            transformers.AutoModelForSequenceClassification,
            run.model,
            task.labels,
            run.dtype,
            pad_token_id=tokenizer.pad_token_id,
        )
        return Prepared(
            model=model,
            head=head,
            train=train,
            held_out=sorted(held_out, key=lambda row: len(row["input_ids"])),
            collate=transformers.DataCollatorWithPadding(tokenizer),
            tasks=data.names(found),
            reduce=predictions,
            metrics=accuracy,
            floor=task.majority,
        )


def _complete(rows: Any, text: str, label: str) -> Any:
    """Return the rows that have both a text and a label."""
    pairs = enumerate(zip(rows[text], rows[label], strict=True))
    return rows.select([row for row, pair in pairs if all(each not in (None, "") for each in pair)])


def _examples(rows: Any, text: str, label: str) -> list[Example]:
    return [Example(str(a), str(b)) for a, b in zip(rows[text], rows[label], strict=True)]
