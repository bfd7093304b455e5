"""LoftQ."""

from collections.abc import Callable

from peftcore.testing import conformance

NOISE = "what rounding loses is noise: with the weight in bfloat16 its principal directions are others"
MOVED = ("llama", "t5", "gpt2", "moe", "mistral", "vit", "dit")


@conformance(
    "loftq",
    options={"*": {"rank": 3}},
    expected_failures={f"low_precision_hosts_keep_their_dtype-{host}": NOISE for host in MOVED},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()
