"""Every promise of the conformance kit, for each method of this plugin."""

from collections.abc import Callable

from peftcore.testing import conformance


@conformance("bitfit", options={"*": {"add_missing_bias": True}})
def test_bitfit(check: Callable[[], None]) -> None:
    check()


@conformance(
    "child_tuning_d",
    expected_failures={
        "factors_are_the_update-moe": "looking at data runs the host, whose grouped products know no float64",
        "base_weights_load_into_an_adapted_host-mlp": "every tensor of this host trains, so the base does not show",
    },
)
def test_child_tuning_d(check: Callable[[], None]) -> None:
    check()


@conformance("linear_probe")
def test_linear_probe(check: Callable[[], None]) -> None:
    check()


@conformance("ln_tuning")
def test_ln_tuning(check: Callable[[], None]) -> None:
    check()
