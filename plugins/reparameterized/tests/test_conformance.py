"""Every promise of the conformance kit, for each method of this plugin."""

from collections.abc import Callable

from peftcore.testing import conformance


@conformance("adalora", options={"mlp": {"rank": 9}})  # at rank 12 its factors have the shapes of weights there
def test_adalora(check: Callable[[], None]) -> None:
    check()


@conformance("dora")
def test_dora(check: Callable[[], None]) -> None:
    check()


@conformance("galore")
def test_galore(check: Callable[[], None]) -> None:
    check()


@conformance("lora")
def test_lora(check: Callable[[], None]) -> None:
    check()


@conformance("lora_plus")
def test_lora_plus(check: Callable[[], None]) -> None:
    check()
