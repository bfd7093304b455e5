"""What a class must be to be a method, and what its tags may say."""

from collections.abc import Mapping
from typing import Any

import pytest
from core_toys import Doubling, ShiftConfig
from plugin_toys import method_members

import peftcore
import peftcore.registry.plugins
from peftcore import Method, MethodConfig, Tags
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
