"""Every promise of the conformance kit, for each method of this plugin."""

from collections.abc import Callable

from peftcore.testing import conformance


@conformance("adapterdrop", options={"*": {"drop_first_layers": 1}})
def test_adapterdrop(check: Callable[[], None]) -> None:
    check()


@conformance("houlsby_adapter")
def test_houlsby_adapter(check: Callable[[], None]) -> None:
    check()


@conformance("ia3")
def test_ia3(check: Callable[[], None]) -> None:
    check()


@conformance("llama_adapter")
def test_llama_adapter(check: Callable[[], None]) -> None:
    check()


@conformance("p_tuning_v2")
def test_p_tuning_v2(check: Callable[[], None]) -> None:
    check()


@conformance("prefix_tuning")
def test_prefix_tuning(check: Callable[[], None]) -> None:
    check()


@conformance("loreft")
def test_loreft(check: Callable[[], None]) -> None:
    check()


@conformance(
    "lst",
    options={"*": {"reduction": 2}},
    expected_failures={
        "generation_in_other_ways_does_not_depend_on_the_cache-mistral": "the masks of a static cache speak of the "
        "window alone, so nothing tells which of the tokens before it are padding; it is refused"
    },
)
def test_lst(check: Callable[[], None]) -> None:
    check()


@conformance("parallel_adapter")
def test_parallel_adapter(check: Callable[[], None]) -> None:
    check()


SHORT = {"gpt2": {"length": 4}}  # a table of 32 positions: several prompts of 20 rows do not fit


@conformance("prompt_tuning", options=SHORT)
def test_prompt_tuning(check: Callable[[], None]) -> None:
    check()


@conformance("p_tuning", options=SHORT)
def test_p_tuning(check: Callable[[], None]) -> None:
    check()
