"""Every promise of the conformance kit, for each method of this plugin."""

from collections.abc import Callable

from peftcore.testing import conformance


@conformance("bitfit", options={"*": {"add_missing_bias": True}})
def test_bitfit(check: Callable[[], None]) -> None:
    check()


@conformance("linear_probe")
def test_linear_probe(check: Callable[[], None]) -> None:
    check()


@conformance("ln_tuning")
def test_ln_tuning(check: Callable[[], None]) -> None:
    check()
