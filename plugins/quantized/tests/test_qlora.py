"""QLoRA."""

from collections.abc import Callable

from peftcore.testing import conformance


@conformance("qlora", options={"*": {"rank": 3}})
def test_conformance(check: Callable[[], None]) -> None:
    check()
