"""Every promise of the conformance kit, for each method of this plugin."""

from collections.abc import Callable

from peftcore.testing import conformance

PARTS = [{"method": "lora"}, {"method": "houlsby_adapter", "up_init_std": 0.0}]


@conformance("config_union", options={"*": {"parts": PARTS}})
def test_config_union(check: Callable[[], None]) -> None:
    check()


@conformance("mam_adapter")
def test_mam_adapter(check: Callable[[], None]) -> None:
    check()


@conformance("unipelt")
def test_unipelt(check: Callable[[], None]) -> None:
    check()
