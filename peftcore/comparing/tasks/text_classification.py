"""The task of texts and their classes: a head on top of any encoder or decoder."""

from __future__ import annotations

from typing import Any

import transformers
from pydantic import PositiveInt

from peftcore.comparing.data.columns import LABEL_NAMES, TEXT_NAMES, choose_column
from peftcore.comparing.data.sources import splits
from peftcore.comparing.data.texts import Example, encode, make_task
from peftcore.comparing.models.loading import classifier, load_tokenizer
from peftcore.comparing.models.naming import Use
from peftcore.comparing.runs.run import Run
from peftcore.comparing.tasks._classes import accuracy, predictions
from peftcore.comparing.tasks.task import Data, Prepared, Task


class TextData(Data):
    """Options of the data: a column of texts, and one of classes."""

    text: str | None = None
    """Column of the texts; guessed when left out."""
    label: str | None = None
    """Column of the classes; guessed when left out."""
    max_length: PositiveInt = 128
    """Tokens kept of a text."""


class TextClassification(Task[TextData]):
    """The task, scored by accuracy."""

    Data = TextData
    metric, greater = "accuracy", True
    use = Use.TEXT

    def prepare(self, run: Run, data: TextData) -> Prepared:
        found = splits(data.train, data.held_out, data.held_out_size)
        text = choose_column(found.train.column_names, data.text, TEXT_NAMES, "text", data.train)
        label = choose_column(found.train.column_names, data.label, LABEL_NAMES, "label", data.train)
        examples = [_examples(part, text, label) for part in (found.train, found.held_out)]
        task = make_task(data.train, *examples)
        tokenizer = load_tokenizer(run.model)
        parts = (task.train, task.held_out)
        train, held_out = (encode(tokenizer, part, task.labels, data.max_length) for part in parts)
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
            reduce=predictions,
            metrics=accuracy,
            floor=task.majority,
        )


def _examples(rows: Any, text: str, label: str) -> list[Example]:
    """Return the rows that have both, as examples."""
    pairs = zip(rows[text], rows[label], strict=True)
    return [Example(str(a), str(b)) for a, b in pairs if a not in (None, "") and b not in (None, "")]
