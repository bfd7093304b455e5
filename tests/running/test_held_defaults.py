"""The tables of defaults: what a row must say, and what is left alone."""

from typing import Any

import held_defaults
import pytest
from named_defaults import assert_as_said, rows

import peftcore

OURS = [info for info in peftcore.methods() if (held_defaults.ROOT / f"plugins/{info.plugin}").is_dir()]
SOURCE = "peft 0.21: LoraConfig.r"
WRONG: dict[str, tuple[str, Any]] = {
    "another default": ("rank", (16, SOURCE)),
    "a default of another type": ("rank", (8.0, SOURCE)),
    "an option that is not there": ("width", (8, SOURCE)),
    "a free option that is not there": ("width", "as wide as it is"),
    "no line, table or library": ("rank", (8, "usual")),
    "a commit without a line": ("rank", (8, "microsoft/LoRA@c4593f0")),
    "no reason": ("rank", ""),
}


def test_a_row_that_is_right_passes() -> None:
    assert_as_said("lora", "rank", (8, SOURCE))
    assert_as_said("lora", "rank", "a small one")


@pytest.mark.parametrize("case", WRONG)
def test_a_row_that_is_wrong_fails(case: str) -> None:
    option, row = WRONG[case]
    with pytest.raises(AssertionError):
        assert_as_said("lora", option, row)


def test_no_default_is_held_and_free() -> None:
    with pytest.raises(AssertionError, match="held and free"):
        rows({("lora", "rank"): (8, SOURCE)}, {("lora", "rank"): "a small one"})


@pytest.mark.parametrize("info", OURS, ids=lambda info: info.name)
def test_results_depend_on_the_tables(info: peftcore.MethodInfo) -> None:
    own, tables = held_defaults.tests_of(info)
    assert own.exists() and {own, tables} <= set(held_defaults.files_of(info))
    assert held_defaults.free(info) <= peftcore.method(info.name).Config.model_fields.keys()


def test_integers_that_may_not_grow_are_made_smaller() -> None:
    assert held_defaults.other(peftcore.method("lqer").Config, "factor_bits") == 4
