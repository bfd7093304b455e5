"""Paths that differ in numbers are written as one, and nothing else is meant by it."""

import itertools
import random
import re

from peftcore.cli.inspection.folded_paths import fold, spans


def test_layers_fold() -> None:
    paths = [f"model.layers.{index}.self_attn.q_proj" for index in range(24)]
    assert fold(paths) == {"model.layers.{0..23}.self_attn.q_proj": paths}


def test_two_numbers_fold_where_they_are_all_combinations() -> None:
    paths = [f"up.{a}.attn.{b}.q" for a, b in itertools.product(range(1, 4), range(2))]
    assert [*fold(paths)] == ["up.{1..3}.attn.{0,1}.q"]
    assert [*fold(paths[:-1])] == ["up.{1,2}.attn.{0,1}.q", "up.3.attn.0.q"]


def test_numbers_inside_names_and_single_paths_stay() -> None:
    assert [*fold(["conv1", "conv2", "a.0", "0/a.1"])] == ["conv1", "conv2", "a.0", "0/a.1"]


def test_spans() -> None:
    assert spans([3]) == "3"
    assert spans([0, 1]) == "{0,1}"
    assert spans([6, 0, 2, 4, 5]) == "{0,2,4..6}"


def unfolded(text: str) -> set[str]:
    """What a fold says, read back."""
    choices = [part[1:-1].split(",") if part.startswith("{") else [part] for part in re.split(r"(\{[^}]*\})", text)]
    return {"".join(each) for each in itertools.product(*[[*itertools.chain(*map(run, each))] for each in choices])}


def run(text: str) -> list[str]:
    first, dots, last = text.partition("..")
    return [str(number) for number in range(int(first), int(last) + 1)] if dots else [text]


def test_folds_say_what_was_folded_and_nothing_more() -> None:
    draw = random.Random(0)
    for _ in range(50):
        paths = sorted({f"a.{draw.randrange(4)}.b.{draw.randrange(3)}.c.{draw.randrange(3)}" for _ in range(20)})
        folds = fold(paths)
        assert sorted(itertools.chain(*folds.values())) == paths
        for text, folded in folds.items():
            assert unfolded(text) == set(folded)
