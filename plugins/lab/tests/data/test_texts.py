"""Labelled texts: split, and numbered as classes."""

from peftcore_lab.data.texts import Example, make_task, split


def examples(count: int) -> list[Example]:
    return [Example(f"text {index}", "ab"[index % 2]) for index in range(count)]


def test_splits_are_disjoint_complete_and_always_the_same():
    pieces = split(examples(100), [20, 10])
    assert [len(piece) for piece in pieces] == [20, 10, 70]
    assert sorted(example for piece in pieces for example in piece) == sorted(examples(100))
    assert pieces == split(examples(100), [20, 10])


def test_integers_are_ordered_by_value_and_before_words():
    train = [Example("t", label) for label in ("10", "9", "-1", "b", "a")] * 3
    assert make_task("here", train, train).labels == ("-1", "9", "10", "a", "b")


def test_majority_is_decided_on_the_training_texts():
    train = [Example("t", label) for label in "aaab"]
    assert make_task("here", train, [Example("t", label) for label in "abbb"]).majority == 0.25
