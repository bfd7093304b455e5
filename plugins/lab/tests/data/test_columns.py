"""The order of classes: that of a head that has learned some, otherwise by number and alphabet."""

import pytest

from peftcore.errors import BadInput
from peftcore_lab.data.columns import numbered


def test_classes_have_the_numbers_of_the_head_that_knows_them() -> None:
    assert numbered(["b", "10", "a", "9", "a"], (), "here") == ("9", "10", "a", "b")
    assert numbered(["a", "b", "a"], ("b", "a"), "here") == ("b", "a")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a", "c"], "the head lacks 'c' and no row has 'b'"),
        (["a", "b", "c"], "the head lacks 'c'[.]"),
        (["a"], "no row has 'b'[.]"),
    ],
)
def test_other_classes_are_refused(labels: list[str], words: str) -> None:
    with pytest.raises(
        BadInput,
        match=f"here: the classes differ from the 2 classes of the adapter's head, 'b', 'a': .*{words}.*--method",
    ):
        numbered(labels, ("b", "a"), "here")
