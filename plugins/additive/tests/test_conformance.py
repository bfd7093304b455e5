"""Every promise of the conformance kit, for each method of this plugin."""

from collections.abc import Callable

from peftcore.testing import conformance


@conformance("houlsby_adapter")
def test_houlsby_adapter(check: Callable[[], None]) -> None:
    check()


@conformance("ia3")
def test_ia3(check: Callable[[], None]) -> None:
    check()
