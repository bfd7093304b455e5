"""What a class must be to be a method, and what its tags may say."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from core_toys import Doubling, ShiftConfig
from plugin_toys import method_members

import peftcore
import peftcore.registry.plugins
from peftcore.author import Method, MethodConfig, Tags
from peftcore.errors import PluginError

pytestmark = pytest.mark.usefixtures("fresh_registry")


@pytest.mark.parametrize("missing", ["name", "Config", "tags", "target", "inject", "parameter_count"])
def test_register_names_what_is_missing(missing: str) -> None:
    members = {key: value for key, value in method_members().items() if key != missing}
    with pytest.raises(PluginError, match=missing):
        peftcore.register(type("Made", (Method,), members))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tags": Tags(category="magic", paper="none")}, "magic"),
        ({"Config": dict}, "MethodConfig"),
        ({"name": 7}, "name"),
    ],
)
def test_register_refuses_what_breaks_the_contract(changes: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(PluginError, match=reason):
        peftcore.register(type("Made", (Method,), {**method_members(), **changes}))


@pytest.mark.parametrize("thing", [object(), dict, Doubling()], ids=["object", "class", "instance"])
def test_register_refuses_what_is_no_method_class(thing: Any) -> None:
    with pytest.raises(PluginError, match="not a subclass"):
        peftcore.register(thing)


def test_methods_are_abstract_or_final() -> None:
    with pytest.raises(PluginError, match="final"):
        type("Variant", (Doubling,), {})


@pytest.mark.parametrize("word", ["target", "name", "seed", "dtype", "host", "train", "exclude", "data", "strict"])
def test_options_cannot_be_called_like_arguments_of_apply(word: str) -> None:
    with pytest.raises(PluginError, match=word):
        type("Bad", (MethodConfig,), {"__annotations__": {word: int}, word: 1})


def test_plain_config_of_a_toy_is_accepted() -> None:
    """The counterpart of the refusals above: the same construction with other words is fine."""
    made = type("Good", (MethodConfig,), {"__annotations__": {"size": int}, "size": 1})
    assert made(method="toy").size == 1
    assert ShiftConfig(start=2.0).start == 2.0


MEMBERS = {name: value for name, value in vars(Doubling).items() if not name.startswith("_")}

# ---------------------------------------------------------------- learning rates of methods

NO_RATE = {
    "adapter_soup": "nothing trains",
    "apt": "no code of its authors was found, nor the table of its paper",
    "arrow": "nothing trains",
    "attention_fusion": "no code of its authors was found, nor its paper's text",
    "attention_only": "its authors' repository has no command for it, and the paper names optimizers alone",
    "bd_lora": "no code of its authors was found, and its paper was not read for a rate",
    "coda": "no code of its authors was found, nor the table of its paper",
    "config_union": "its parts have their own",
    "dare": "nothing trains",
    "kadaptation": "its authors' toolkit searches one for each set of data, and no table of those was found",
    "ln_tuning": "no code of its authors was found, nor the table of its paper",
    "lorand": "its paper was not read for a rate, nor the configurations of detectors in its authors' repository",
    "lqer": "nothing trains",
    "spt_selective": "no code of its authors was found, nor its paper's text",
    "moa_adapters": "no single paper has it",
    "mica": "the example of it in peft names none, and no other code of its authors was found",
    "peqa": "no code of its authors was found, nor the table of its paper",
    "perfusion": "its authors published no code, and its paper was not read for a rate",
    "polyhistor": "no code of its authors was found, nor its paper's text",
    "regmean": "nothing trains",
    "res_tuning": "the library that has its authors' code names none, nor was its paper's appendix read for a rate",
    "task_arithmetic": "nothing trains",
    "ties_merging": "nothing trains",
    "tinylora": "no code of its authors was found, nor the table of its paper",
    "unipelt": "its authors' repository has no command, and their library's default is no choice of theirs",
    "xlora": "its authors' repository has no training script, and the paper names no rate",
}
"""Methods of ours that name no learning rate, with reasons."""
SOURCE = re.compile(
    r"[\w.-]+/[\w.-]+@[0-9a-f]{7}, \S+|arXiv \d{4}\.\d{5}(v\d)?, (table|section|appendix|implementation).*"
)


def test_each_method_names_the_learning_rate_of_its_source() -> None:
    found = {info.name: peftcore.method(info.name).learning_rate for info in peftcore.methods()}
    assert {name for name, rate in found.items() if rate is None} == NO_RATE.keys()
    for name, rate in found.items():
        if rate is not None:
            assert SOURCE.fullmatch(rate.source), f"{name}: {rate.source}"
            assert 0 < rate.rate <= (40 if rate.optimizer == "SGD" else 1) and rate.on, name
            assert issubclass(getattr(torch.optim, rate.optimizer), torch.optim.Optimizer), name
            assert bool(rate.momentum) == (rate.optimizer == "SGD"), name


def test_a_learning_rate_says_where_it_is_from() -> None:
    rate = peftcore.author.LearningRate(3e-4, "google-research/adapter-bert@1a31fc6, README.md", on="BERT-base, MRPC")
    assert str(rate) == "0.0003 (AdamW; BERT-base, MRPC): google-research/adapter-bert@1a31fc6, README.md"


def test_several_values_of_an_option_may_ask_for_data() -> None:
    class Options(MethodConfig):
        method: Literal["picky"] = "picky"
        score: Literal["a", "b", "c"] = "a"
        deep: bool = False

    class Picky(Method):
        name = "picky"
        Config = Options
        tags = Tags(category="selective", paper="none", data_options={"score": ("b", "c"), "deep": True})
        target = "*"

        def inject(self, model: Any, config: Any, surgeon: Any) -> None: ...

        @staticmethod
        def parameter_count(site: Any, config: Any) -> int:
            return 0

    said = {
        (score, deep): Picky.looks_at_data(Options(score=score, deep=deep))
        for score in ("a", "b", "c")
        for deep in (False, True)
    }
    assert [case for case, looks in said.items() if looks] == [("b", True), ("c", True)]
    assert Picky.asks_for_data({"score": "c", "deep": True}) and not Picky.asks_for_data({"score": "c"})
    assert Picky.looks_at_data(Options(deep=True, overrides={"x": {"score": "b"}}))
