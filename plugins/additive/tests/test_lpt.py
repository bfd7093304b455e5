from collections.abc import Callable

from peftcore.testing import conformance


# Generation without a cache has to be told where the prompt ends: each sequence of the kit has three tokens at least.
@conformance(
    "lpt", options={"moe": {"length": 4}}, context=lambda model, picture: {"prompt_length": 3}
)  # 5 rows and 5 tokens, twice, for two experts, have the size of moe's table
def test_conformance(check: Callable[[], None]) -> None:
    check()
