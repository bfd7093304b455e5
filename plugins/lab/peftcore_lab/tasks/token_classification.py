"""The token classification task: a head predicts a tag for every word."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from pydantic import PositiveInt

from peftcore.errors import BadInput
from peftcore.models.loading import classifier, load_tokenizer
from peftcore.models.model_names import Use
from peftcore_lab.data.columns import choose_column, numbered
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks._classes import learned, predictions
from peftcore_lab.tasks.task import IGNORED, Prepared, RowsOfTasks, Task

WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "pos_tags", "labels")
OUTSIDE = "O"
"""The conventional tag of words outside of all classes."""


class TaggedData(RowsOfTasks):
    """Options of the data: a column of lists of words, and one of lists of tags."""

    words: str | None = None
    """Column of the words. By default it is detected by its name."""
    tags: str | None = None
    """Column of the tags. By default it is detected by its name."""
    max_length: PositiveInt = 128
    """Maximum number of tokens of a text; longer texts are cut."""


class TokenClassification(Task[TaggedData]):
    """The token classification task, scored by F1 of tagged words. The prediction at the first token of a word
    counts."""

    Data = TaggedData
    metric, greater = "f1", True
    use = Use.TEXT

    def prepare(self, run: Run, data: TaggedData) -> Prepared:
        found = data.splits()
        words = choose_column(found.train.column_names, data.words, WORDS, "words", data.train)
        tags = choose_column(found.train.column_names, data.tags, TAGS, "tags", data.train)
        parts = [_rows(part, words, tags, data.train) for part in (found.train, found.held_out)]
        labels = numbered((str(tag) for _, tagged in parts[0] for tag in tagged), learned(run), data.train)
        unseen = {str(tag) for _, tagged in parts[1] for tag in tagged}.difference(labels)
        if len(labels) < 2 or unseen:
            what = f"no training row has the tag {min(unseen)!r}" if unseen else "there is only one tag"
            raise BadInput(f"{data.train}: {what}")
        tokenizer = load_tokenizer(run.model)
        if not tokenizer.is_fast:
            raise BadInput(
                f"{run.model}: its tokenizer is not a fast one, so it does not map tokens to words: use a model with a "
                "fast tokenizer"
            )
        train, held_out = (
            data.told([_encoded(tokenizer, *row, labels, data.max_length) for row in part], rows)
            for part, rows in zip(parts, (found.train, found.held_out), strict=True)
        )
        model, head = classifier(transformers.AutoModelForTokenClassification, run.model, labels, run.dtype)
        return Prepared(
            model=model,
            head=head,
            train=train,
            held_out=held_out,
            collate=transformers.DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED),
            tasks=data.names(found),
            reduce=predictions,
            metrics=lambda result: scores(result.predictions, result.label_ids, labels),
        )


def _rows(part: Any, words: str, tags: str, source: str) -> list[tuple[list[str], list[Any]]]:
    rows = list(zip(part[words], part[tags], strict=True))
    for number, (said, tagged) in enumerate(rows, start=1):
        if not (isinstance(said, list) and isinstance(tagged, list) and len(said) == len(tagged)):
            raise BadInput(f"{source}: row {number} must have a list of words and a tag for each")
    return rows


def _encoded(tokenizer: Any, words: list[str], tags: list[Any], labels: tuple[str, ...], length: int) -> dict[str, Any]:
    row = tokenizer(words, is_split_into_words=True, truncation=True, max_length=length)
    numbers, before = [], None
    for word in row.word_ids():
        counts = word is not None and word != before
        numbers.append(labels.index(str(tags[word])) if counts else IGNORED)
        before = word
    return {**row, "labels": numbers}


def scores(predicted: Any, truth: Any, labels: tuple[str, ...]) -> dict[str, float]:
    """Return the accuracy over all words, and F1 over the words with a tag other than "O"."""
    counted = truth != IGNORED
    predicted, truth = predicted[counted], truth[counted]
    outside = labels.index(OUTSIDE) if OUTSIDE in labels else -1
    right = np.sum((predicted == truth) & (truth != outside))
    found = np.sum(predicted != outside) + np.sum(truth != outside)
    return {"accuracy": float(np.mean(predicted == truth)), "f1": float(2 * right / max(found, 1))}
