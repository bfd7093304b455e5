"""Every promise of the conformance kit, for lists of methods; tests/training/test_hybrids.py has more."""

from collections.abc import Callable

from peftcore.testing import conformance


@conformance(
    "config_union", options={"*": {"parts": [{"method": "lora"}, {"method": "houlsby_adapter", "up_init_std": 0.0}]}}
)
def test_conformance(check: Callable[[], None]) -> None:
    check()
