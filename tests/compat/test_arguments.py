"""Arguments of peft that say what is so anyway pass; others are refused."""

import pytest

from peftcore.errors import ConfigError

pytest.importorskip("peft")
arguments = pytest.importorskip("peftcore.compat.arguments")


def test_they_are_left_out_and_others_stay() -> None:
    given = {"autocast_adapter_dtype": True, "low_cpu_mem_usage": True, "token": None, "rank": 3}
    assert arguments.without_peft_arguments(given) == {"rank": 3}
    arguments.check_no_more({"autocast_adapter_dtype": True})


@pytest.mark.parametrize(
    ("given", "message"),
    [({"autocast_adapter_dtype": False}, "dtype="), ({"token": "hf_x"}, "HF_TOKEN"), ({"config": object()}, "folder")],
)
def test_what_says_something_else_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments.without_peft_arguments(given)


def test_what_is_no_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank="):
        arguments.check_no_more({"rank": 3})
