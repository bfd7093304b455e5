"""Every promise of the conformance kit, for each method of this plugin."""

from collections.abc import Callable

from peftcore.testing import conformance


@conformance("dora")
def test_dora(check: Callable[[], None]) -> None:
    check()


@conformance("lora")
def test_lora(check: Callable[[], None]) -> None:
    check()
