"""Labelled texts as a classification task: their classes are numbered, and the texts are split and tokenized."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from peftcore.errors import BadInput
from peftcore_lab.data.columns import numbered

SPLIT_SEED = 0
"""The seed of splits. It does not depend on the seed of a run, so that all runs have the same held-out examples."""


class Example(NamedTuple):
    text: str
    label: str


Encoded = dict[str, Any]
"""One tokenized text, with the inputs of the model: ``input_ids``, ``attention_mask``, ``labels``."""


@dataclass(frozen=True)
class LabelledTexts:
    """A classification task: training texts, validation texts, and the classes in the order of their numbers."""

    source: str
    train: list[Example]
    held_out: list[Example]
    labels: tuple[str, ...]

    @property
    def majority(self) -> float:
        """The majority baseline: the accuracy on the validation texts if the answer is always the most frequent class
        of the training texts."""
        counts = {label: sum(example.label == label for example in self.train) for label in self.labels}
        commonest = max(self.labels, key=counts.__getitem__)
        return sum(example.label == commonest for example in self.held_out) / len(self.held_out)


def make_task(source: str, train: list[Example], held_out: list[Example], known: Sequence[str] = ()) -> LabelledTexts:
    """Return a task with numbered classes, in the order of a trained head if there is one. Raise BadInput for data that
    cannot be trained or scored."""
    labels = {example.label for example in (*train, *held_out)}
    if len(labels) < 2:
        raise BadInput(f"{source}: every row has the label {labels.pop()!r}; a comparison needs at least two classes")
    if len(labels) > len(train) // 2:
        raise BadInput(f"{source}: {len(labels)} labels on {len(train)} training rows; is that the label column?")
    unseen = labels - {example.label for example in train}
    if unseen:
        raise BadInput(f"{source}: no training row has the label {min(unseen)!r}; add training rows, or hold out fewer")
    return LabelledTexts(source, train, held_out, numbered(labels, known, source))


def split(examples: Iterable[Example], sizes: Sequence[int]) -> list[list[Example]]:
    """Return the examples, shuffled with a fixed seed, in parts of the given sizes. An additional last part contains
    all other examples and is never empty."""
    pool = list(examples)
    if sum(sizes) >= len(pool):
        raise BadInput(f"cannot hold out {sum(sizes)} of {len(pool)} rows: some must remain to train on")
    random.Random(SPLIT_SEED).shuffle(pool)
    pieces, start = [], 0
    for size in sizes:
        pieces.append(pool[start : start + size])
        start += size
    return [*pieces, pool[start:]]


def encode(tokenizer: Any, examples: Sequence[Example], labels: Sequence[str], max_length: int) -> list[Encoded]:
    """Return the tokenized examples, cut at ``max_length`` tokens. The collator pads each batch to the longest text in
    the batch."""
    number = {label: index for index, label in enumerate(labels)}
    columns = dict(tokenizer([example.text for example in examples], truncation=True, max_length=max_length))
    if len(examples) > 1 and all(ids == columns["input_ids"][0] for ids in columns["input_ids"]):
        raise BadInput(
            "the tokenizer returns the same ids for every text: check that its vocabulary is in the model folder"
        )
    return [
        {**{name: values[row] for name, values in columns.items()}, "labels": number[example.label]}
        for row, example in enumerate(examples)
    ]
