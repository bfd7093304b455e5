"""The verbs of a method's `inject`, as authors see them."""

from pathlib import Path

import pytest
from core_toys import perceptron

import peftcore
from peftcore.author import Surgeon
from peftcore.surgery.surgeon import RecordingSurgeon


def test_authors_see_the_verbs_and_not_how_they_record() -> None:
    verbs = {"sites", "chosen", "graft", "attention_site", "sequence", "sequence_site", "blocks_of", "include",
             "collect", "own", "replace", "train"}  # fmt: skip
    assert Surgeon.__abstractmethods__ == verbs
    assert {name for name in vars(Surgeon) if not name.startswith("_")} == {*verbs, "at", "attention"}
    assert not RecordingSurgeon.__abstractmethods__
    with pytest.raises(TypeError, match="abstract"):
        Surgeon()  # type: ignore[abstract]


def test_a_graft_knows_its_name_in_files_and_whether_the_user_asked_for_it(tmp_path: Path) -> None:
    injection = peftcore.apply(perceptron(), [{"method": "lora", "rank": 2, "target": "first"}], train=["second"])
    own, *along = injection.grafts
    assert own.key == "0/first" and own.by_method and not own.trained_along
    assert [each.key for each in along] == ["second", "second.bias"]
    assert all(each.trained_along and not each.by_method and not each.adds_rows for each in along)
