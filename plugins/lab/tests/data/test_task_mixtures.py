"""Examples of several tasks in one table: which rows are taken, and what is refused before a model is read."""

import pytest
from datasets import Dataset

from peftcore.errors import BadInput
from peftcore_lab.data.example_sources import ExampleSource, Splits
from peftcore_lab.data.task_mixtures import TASK, names_in, of_tasks, told


def found(train: list[object], held_out: list[object]) -> Splits:
    parts = (Dataset.from_dict({"kind": each, "text": [*map(str, range(len(each)))]}) for each in (train, held_out))
    return Splits(*parts, names=(ExampleSource("texts.csv"), ExampleSource("others.csv")))


def test_rows_are_those_of_the_tasks_and_know_them() -> None:
    whole = found(["b", "a", "c", "a"], ["a", "b"])
    assert of_tasks(whole, None, ()) is whole
    assert names_in(of_tasks(whole, "kind", ()).train, "kind") == ("a", "b", "c")
    some = of_tasks(whole, "kind", ("a",))
    assert (some.train["text"][:], some.held_out["text"][:]) == (["1", "3"], ["0"])
    assert [some.names[0].row(index) for index in (0, 1)] == ["texts.csv, row 2", "texts.csv, row 4"]
    assert told([{"x": 1}, {"x": 2}], some.train, "kind") == [{"x": 1, TASK: "a"}, {"x": 2, TASK: "a"}]
    assert told([{"x": 1}], some.train, None) == [{"x": 1}]
    numbers = of_tasks(found([3, 10], [3]), "kind", ("3",))
    assert told([{}], numbers.train, "kind") == [{TASK: "3"}]


@pytest.mark.parametrize(
    ("train", "held_out", "column", "wanted", "reason"),
    [
        (["a"], ["a"], "task", (), "texts.csv: no column 'task'; its columns are kind, text"),
        (["a", None], ["a"], "kind", (), "texts.csv, row 2 has no task in the column kind"),
        (["a"], ["a", " "], "kind", (), "others.csv, row 2 has no task"),
        (["a", "b"], ["a"], "kind", ("b", "x"), "data.tasks=x has no row to train on; .* have the tasks a, b"),
        (["a", "b"], ["c"], "kind", (), "others.csv: the task c has no row to train on; .* have the tasks a, b"),
        (["a", "b"], ["a"], "kind", ("b",), "others.csv: no row belongs to b"),
        (["a"], ["a"], None, ("a",), "data.task_column"),
    ],
)
def test_what_is_refused(
    train: list[object], held_out: list[object], column: str | None, wanted: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(BadInput, match=reason):
        of_tasks(found(train, held_out), column, wanted)
