"""Every promise of the conformance kit, for lists of methods; tests/training/test_optimizer_hybrids.py has more."""

from collections.abc import Callable

from peftcore.testing import conformance

ROWS = "what the adapters keep beside the host there, 32 rows of 8 features, has the shape of a weight"


@conformance(
    "config_union",
    options={"*": {"parts": [{"method": "lora"}, {"method": "houlsby_adapter", "up_init_std": 0.0}]}},
    expected_failures={"effective_weights_do_not_outlive_their_use-unet": ROWS},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()
