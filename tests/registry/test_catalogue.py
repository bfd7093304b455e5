"""Methods by name, alias and category, of plugins and registered at run time; and the schema of their options."""

import json
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
from core_toys import Doubling, Shift, perceptron
from plugin_toys import GOOD, Aliased, method_members, names, plugin, point

import peftcore
import peftcore.registry.plugins
from peftcore.author import Method
from peftcore.errors import AmbiguousMethod, PluginError, UnknownMethod
from peftcore.registry.catalogue import schema

pytestmark = pytest.mark.usefixtures("fresh_registry")


def test_clash_of_method_names_names_both_distributions(install: Callable[..., None]) -> None:
    install(
        point("one", plugin(), "one-dist", "1.0"),
        point("two", plugin({"toy_doubling": "core_toys:Doubling"}), "two-dist", "2.0"),
    )
    with pytest.raises(AmbiguousMethod, match=r"one-dist 1\.0.*'one/toy_doubling'.*two-dist 2\.0.*'two/toy_doubling'"):
        peftcore.method("toy_doubling")
    assert peftcore.method("two/toy_doubling") is Doubling
    peftcore.apply(perceptron(), "one/toy_doubling", target="first")


def test_registered_method_that_clashes_with_a_plugins_is_ambiguous(install: Callable[..., None]) -> None:
    install(point("one", plugin(), "one-dist", "1.0"))
    peftcore.register(Doubling)
    with pytest.raises(AmbiguousMethod, match=r"one-dist 1\.0.*registered at run time"):
        peftcore.method("toy_doubling")
    assert peftcore.method("registered/toy_doubling") is Doubling


def test_close_names_are_offered(install: Callable[..., None]) -> None:
    install(point("good", plugin()))
    with pytest.raises(UnknownMethod, match="did you mean 'toy_doubling'"):
        peftcore.method("toy_dubling")


def test_unknown_name_lists_what_there_is(install: Callable[..., None]) -> None:
    install(point("good", plugin()))
    with pytest.raises(UnknownMethod, match="there are: toy_doubling"):
        peftcore.method("zzz")


@pytest.mark.parametrize(("name", "package"), [("lora", "peftcore-reparameterized"), ("bitfit", "peftcore-selective")])
def test_method_of_a_plugin_that_is_not_installed_names_the_pip_line(
    name: str, package: str, install: Callable[..., None]
) -> None:
    install(point("vision", plugin()))
    with pytest.raises(UnknownMethod, match=f"pip install .*{package}"):
        peftcore.apply(perceptron(), name, target="first")


def test_without_any_plugin_one_line_installs_all(install: Callable[..., None]) -> None:
    install()
    with pytest.raises(UnknownMethod, match=r"no plugin is installed: pip install 'peftcore\[all\]'"):
        peftcore.apply(perceptron(), "lora", target="first")


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("no_such_module_anywhere:Thing", "no_such_module_anywhere"),
        ("core_toys:NoSuchClass", "NoSuchClass"),
        ("core_toys:Perceptron", "not a subclass"),
        ("core_toys:Shift", "toy_shift"),
    ],
)
def test_method_that_cannot_be_had_is_reported_when_it_is_asked_for(
    place: str, reason: str, install: Callable[..., None]
) -> None:
    install(point("good", plugin({"wrong": place, **GOOD}), "good-dist", "1.0"))
    assert names() == ["toy_doubling", "wrong"]
    with pytest.raises(PluginError, match=reason):
        peftcore.method("wrong")
    assert peftcore.method("toy_doubling") is Doubling


def test_method_modules_are_imported_on_first_use_only() -> None:
    script = """
import sys, peftcore
plugins = tuple(f"peftcore_{category}." for category in peftcore.contract.method.CATEGORIES)
own = lambda: sorted(m for m in sys.modules if m.startswith(plugins) and "._" not in m and ".backends" not in m)
# methods, not what they share, and not the schemes, which are plugins themselves
assert {"lora", "ia3", "bitfit"} <= {info.name for info in peftcore.methods()}
assert own() == [], own()
peftcore.method("lora")
assert own() == ["peftcore_reparameterized.lora"], own()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_methods_by_category(install: Callable[..., None]) -> None:
    install(point("good", plugin({**GOOD, "toy_shift": "core_toys:Shift"})))
    assert [info.name for info in peftcore.methods("additive")] == ["toy_doubling"]
    (info,) = peftcore.methods("reparameterized")
    assert (info.name, info.plugin, info.distribution, info.paper) == ("toy_shift", "good", "good-dist 1.0", "none")
    assert info.tags is Shift.tags


def test_aliases_name_the_same_method(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("toy_aliased_module")
    module.Aliased = Aliased
    monkeypatch.setitem(sys.modules, "toy_aliased_module", module)
    place = "toy_aliased_module:Aliased"
    install(point("good", plugin({"toy_long_name": place, "toy_short": place})))
    (info,) = peftcore.methods()
    assert (info.name, info.aliases) == ("toy_long_name", ("toy_short",))
    assert (
        peftcore.method("toy_short") is peftcore.method("good/toy_short") is peftcore.method("toy_long_name") is Aliased
    )
    assert peftcore.apply(perceptron(), "toy_short").name == "toy_long_name"


def test_aliases_that_a_plugin_does_not_list_are_a_fault_of_the_plugin(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("toy_aliased_module")
    module.Aliased = Aliased
    monkeypatch.setitem(sys.modules, "toy_aliased_module", module)
    install(point("good", plugin({"toy_long_name": "toy_aliased_module:Aliased"})))
    with pytest.raises(PluginError, match="toy_short"):
        peftcore.method("toy_long_name")


def test_method_registered_at_run_time_is_listed_and_applied(install: Callable[..., None]) -> None:
    install()
    assert peftcore.register(Aliased) is Aliased
    (info,) = peftcore.methods()
    assert (info.name, info.aliases, info.plugin) == ("toy_long_name", ("toy_short",), "registered")
    injection = peftcore.apply(perceptron(), "toy_short")
    assert isinstance(injection.method, Aliased)


def test_registering_a_name_again_replaces_it(install: Callable[..., None]) -> None:
    install()
    peftcore.register(Doubling)
    again = type("Doubling", (Method,), {**method_members(), "name": "toy_doubling"})
    peftcore.register(again)
    assert peftcore.method("toy_doubling") is again


@pytest.mark.share(3)
@pytest.mark.parametrize("name", [info.name for info in peftcore.methods()])
def test_schema_describes_every_option_in_the_words_of_its_docstring(name: str) -> None:
    described = schema(name)
    json.dumps(described)
    assert described["additionalProperties"] is False
    fields = {field: info for field, info in peftcore.method(name).Config.model_fields.items() if field != "method"}
    for field, info in fields.items():
        assert described["properties"][field].get("description"), f"{name}.{field} has no docstring"
        assert described["properties"][field]["description"] == info.description


def test_schema_carries_docstring_and_rule() -> None:
    rank = schema("lora")["properties"]["rank"]
    assert rank["description"] == "Rank of the update."
    assert (rank["type"], rank["exclusiveMinimum"], rank["default"]) == ("integer", 0, 8)


def test_schema_of_all_methods_tells_them_apart_by_method() -> None:
    together = schema()
    json.dumps(together)
    names = {info.name for info in peftcore.methods()}
    assert set(together["$defs"]) == names
    assert {ref["$ref"] for ref in together["oneOf"]} == {f"#/$defs/{name}" for name in names}
    for name in names:
        assert together["$defs"][name]["properties"]["method"]["const"] == name
    assert together["discriminator"] == {"propertyName": "method"}
