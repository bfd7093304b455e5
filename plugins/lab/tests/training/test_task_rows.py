"""Rows of several tasks: batches and their tasks, scores of each task beside others' counts, options of methods."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

import peftcore
from peftcore.errors import ConfigError, MissingContext
from peftcore_lab.data.task_mixtures import TASK
from peftcore_lab.runs.run import MethodChoice
from peftcore_lab.tasks._classes import accuracy
from peftcore_lab.training.task_rows import collate, metrics, options_for, told, without_names

ROWS = [{"x": number, TASK: task} for number, task in enumerate("abaab")]


def prepared(**more: Any) -> Any:
    def put(rows: list[dict[str, int]]) -> dict[str, Any]:
        assert all([*row] == ["x"] for row in rows)
        return {"x": torch.tensor([row["x"] for row in rows])}

    return SimpleNamespace(**{"tasks": ("a", "b"), "collate": put, "metrics": accuracy, "held_out": ROWS, **more})


def test_batches_have_the_names_and_the_model_does_not_see_them() -> None:
    batch = collate(prepared())(ROWS[1:3])
    assert batch[TASK] == ["b", "a"] and batch["x"].tolist() == [1, 2]
    assert [*without_names(prepared())(ROWS)] == ["x"]
    model = nn.Sequential(nn.Linear(6, 4))
    injection = peftcore.apply(model, "polytropon", target="0", tasks=["a", "b"])
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_()
    x = torch.randn(2, 6)
    with told(model.eval(), {"input": x, TASK: ["b", "a"]}) as rest:
        found = model(**rest)
    with peftcore.call(model, task=[1, 0]):
        assert torch.equal(found, model(x))
    with peftcore.call(model, task=[0, 1]):
        assert not torch.allclose(found, model(x))
    with told(model, {"input": x}) as rest, pytest.raises(MissingContext):
        model(**rest)


@pytest.mark.parametrize("held_out", [ROWS, Dataset.from_list(ROWS)])
def test_scores_of_each_task_are_those_of_its_rows(held_out: Any) -> None:
    """Right are rows 0 and 3 of task a and row 1 of task b."""
    found = transformers.EvalPrediction(np.array([1, 1, 0, 1, 0]), np.array([1, 1, 1, 1, 1]))
    scores = metrics(prepared(held_out=held_out, tasks=("a", "b", "unscored")))
    assert scores is not None
    assert scores(found) == {"accuracy": 3 / 5, "accuracy/a": 2 / 3, "accuracy/b": 1 / 2}
    assert metrics(prepared(tasks=())) is accuracy


def test_methods_that_ask_for_tasks_get_their_names() -> None:
    names = ("a", "b")
    further = ("polyhistor", "multitask_prompt_tuning", "attempt")
    for method in ("polytropon", "mhr", "c_poly", "mtl_lora", "hyperformer_pp", "hyperformer", "pha", "pal", *further):
        assert options_for(MethodChoice(name=method), names) == {"tasks": ["a", "b"]}, method
        assert options_for(MethodChoice(name=method), ()) == {}
    assert options_for(MethodChoice.model_validate({"name": "lora", "rank": 2}), names) == {"rank": 2}
    more = MethodChoice.model_validate({"name": "mtl_lora", "tasks": ["c", "b", "a"]})
    assert options_for(more, names) == {"tasks": ["c", "b", "a"]}
    for known, reason in ((["a", "c"], "there is no task 'b': a, c"), (2, "has no names, but the data has: a, b")):
        with pytest.raises(ConfigError, match=reason):
            options_for(MethodChoice.model_validate({"name": "polytropon", "tasks": known}), names)
