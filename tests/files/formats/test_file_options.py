"""Options in a foreign file: each is taken, passed over as harmless, or refused by name."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from peftcore.errors import CheckpointError
from peftcore.files.formats.file_options import Keys

WHERE = Path("adapter_config.json")


def keys(**data: Any) -> Keys:
    return Keys(data, WHERE)


def test_values_have_the_kind_that_is_wanted() -> None:
    found = keys(r=8, alpha=16, dropout=0.1, bias="none", none=None)
    assert found.take("r", int) == 8 and found.take("alpha", float) == 16
    assert found.take("none", int, 3) == 3 and found.take("lacks", str, "") == ""
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: 'lacks' is missing, expected int"):
        found.take("lacks", int)
    with pytest.raises(CheckpointError, match=r"'dropout' is 0\.1, expected int"):
        found.take("dropout", int)
    with pytest.raises(CheckpointError, match="'none' is None, expected int or str"):
        found.take("none", (int, str))


def test_a_truth_value_is_no_number() -> None:
    with pytest.raises(CheckpointError, match="'r' is True"):
        keys(r=True).take("r", int)
    assert keys(fan_in=True).take("fan_in", bool) is True


def test_names_are_one_or_several() -> None:
    found = keys(one="q", several=["q", "v"], wrong=["q", 3])
    assert found.names("one") == ["q"] and found.names("several") == ["q", "v"] and found.names("lacks") == []
    with pytest.raises(CheckpointError, match="expected names"):
        found.names("wrong")
    assert keys(table={"q": 1}).table("table") == {"q": 1}


def test_only_what_is_understood_or_off() -> None:
    keys(bias="none").only("bias", "none", "all")
    keys(bias=False).only("bias", "none")
    keys(only=None).only("only", True)
    with pytest.raises(CheckpointError, match="'only' is False, which changes"):
        keys(only=False).only("only", True)
    with pytest.raises(CheckpointError, match="'bias' is 'some', which changes what the adapter computes"):
        keys(bias="some").only("bias", "none")


def test_what_nobody_took_is_refused_unless_it_is_off() -> None:
    found = keys(r=8, revision="main", new=None, other=[])
    found.take("r", int)
    found.pass_over("revision")
    found.check_known()
    strange = keys(b=1, a="x")
    with pytest.raises(
        CheckpointError, match="does not know these options, which may change the outputs: a = 'x', b = 1"
    ):
        strange.check_known()


def test_what_is_told_is_told_once() -> None:
    found = keys(r=8)
    with pytest.warns(UserWarning, match="it is old") as told:
        found.warn("it is old")
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.patched({"r": 4}).warn("it is old")


def test_a_patched_file_shares_what_is_known() -> None:
    found = keys(r=8)
    assert found.patched({"r": 4}).take("r", int) == 4
    found.check_known()
    assert found.take("r", int) == 8
