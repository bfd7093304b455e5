from collections.abc import Callable

from peftcore.testing import conformance


@conformance("spt_lora", options={"*": {"share": 0.1, "rank": 2}})
def test_conformance(check: Callable[[], None]) -> None:
    check()
