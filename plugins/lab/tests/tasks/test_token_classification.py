"""Words and their tags: what is labelled, and the score."""

import json
from pathlib import Path

import numpy as np
import pytest

from peftcore_lab.runs.reading import read
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks.task_catalogue import find
from peftcore_lab.tasks.token_classification import scores


def configured(model: Path, name: str, source: object) -> Run:
    return read(Run, {}, [("model", str(model)), ("task", name), ("data.train", str(source)), ("method", "lora")])


def test_the_first_token_of_a_word_speaks_for_it(encoder: Path, tmp_path: Path) -> None:
    """A word that the vocabulary has not is one token, a dash makes three of two words."""
    path = tmp_path / "tagged.jsonl"
    line = json.dumps({"tokens": ["my-phone", "is", "fine"], "ner_tags": ["A", "O", "B"]})
    path.write_text("\n".join([line] * 5), encoding="utf-8")
    run = configured(encoder, "token-classification", path)
    prepared = find("token-classification").prepare(run, find("token-classification").Data(train=str(path)))
    assert prepared.train[0]["labels"] == [-100, 0, -100, -100, 2, 1, -100]


def test_f1_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    draw = np.random.default_rng(0)
    truth, predicted = draw.integers(-1, 4, (9, 7)), draw.integers(0, 4, (9, 7))
    truth[truth == -1] = -100
    found, counted = scores(predicted, truth, ("A", "B", "C", "O")), truth != -100
    assert found["accuracy"] == pytest.approx(accuracy_score(truth[counted], predicted[counted]))
    expected = f1_score(truth[counted], predicted[counted], labels=[0, 1, 2], average="micro")
    assert found["f1"] == pytest.approx(expected)
