"""Plugins are loaded one by one: a broken one is reported with its distribution and version, and the rest works."""

import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from core_toys import Doubling, DoublingConfig, Shift, ShiftConfig, perceptron

import peftcore
import peftcore.registry.plugins
from peftcore import Method, MethodConfig, Tags, hookimpl
from peftcore.errors import AmbiguousMethod, PluginError, UnknownMethod
from peftcore.registry.plugins import PluginWarning

pytestmark = pytest.mark.usefixtures("fresh_registry")

GOOD = {"toy_doubling": "core_toys:Doubling"}


@dataclass
class Point:
    """What an entry point of an installed distribution looks like to the core."""

    name: str
    load: Callable[[], Any]
    dist: Any = field(default_factory=lambda: SimpleNamespace(name="good-dist", version="1.0"))
    value: str = "module"


def plugin(methods: Any = GOOD, api: Any = peftcore.API, **hooks: Any) -> types.ModuleType:
    """A plugin module that brings `methods`."""
    module = types.ModuleType("toy_plugin")
    if api is not None:
        module.PEFTCORE_API = api
    module.peftcore_methods = hookimpl(lambda: methods)
    for name, function in hooks.items():
        setattr(module, name, function)
    return module


def point(name: str, module: Any, distribution: str = "good-dist", version: str = "1.0") -> Point:
    return Point(name, lambda: module, SimpleNamespace(name=distribution, version=version))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these entry points the only ones that are installed."""

    def replace(*points: Point) -> None:
        def entry_points(*, group: str) -> list[Point]:
            return list(points) if group == "peftcore" else []

        monkeypatch.setattr("importlib.metadata.entry_points", entry_points)

    return replace


def names() -> list[str]:
    return [info.name for info in peftcore.methods()]


def import_failure() -> Any:
    raise ImportError("no module named 'missing_dependency'")


def any_failure() -> Any:
    raise ZeroDivisionError("division by zero")


class NoMapping:
    def __iter__(self) -> Any:
        raise RuntimeError("methods cannot be read")


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "fails at import": (import_failure, "missing_dependency"),
    "raises something else at import": (any_failure, "division by zero"),
    "speaks an older API": (lambda: plugin(api=peftcore.API - 1), "API 1, this peftcore speaks 2; docs/upgrade.md"),
    "speaks a newer API": (lambda: plugin(api=3), "API 3"),
    "says no API": (lambda: plugin(api=None), "API None"),
    "misspells a hook": (lambda: plugin(peftcore_injekt=hookimpl(lambda model: True)), "peftcore_injekt"),
    "asks for an argument that the hook has not": (lambda: plugin(peftcore_map=hookimpl(lambda modle: None)), "modle"),
    "maps to a class": (lambda: plugin({"toy": Doubling}), "toy"),
    "maps to a place without a class": (lambda: plugin({"toy": "core_toys"}), "toy"),
    "maps from a number": (lambda: plugin({7: "core_toys:Doubling"}), "7"),
    "returns no mapping": (lambda: plugin(NoMapping()), "methods cannot be read"),
    "returns nothing": (lambda: plugin(None), "None"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_plugin_is_one_warning_and_the_rest_works(kind: str, install: Callable[..., None]) -> None:
    load, reason = BROKEN[kind]
    bad = Point("bad", load, SimpleNamespace(name="bad-dist", version="9.9"))
    install(bad, point("good", plugin()))
    with pytest.warns(PluginWarning) as caught:
        listed = names()
    assert listed == ["toy_doubling"]
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "'bad'" in message and "bad-dist 9.9" in message and reason in message
    peftcore.apply(perceptron(), "toy_doubling", target="first")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_plugin_leaves_no_hook_behind(kind: str, install: Callable[..., None]) -> None:
    load, _ = BROKEN[kind]
    install(Point("bad", load))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        registry = peftcore.registry.plugins.registry()
    assert registry.plugins == {}
    assert [name for name, _ in registry.manager.list_name_plugin()] == ["peftcore.core_plugin"]
    registry.manager.check_pending()


def test_warning_comes_once(install: Callable[..., None]) -> None:
    install(Point("bad", import_failure))
    with pytest.warns(PluginWarning):
        peftcore.methods()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftcore.methods()


def test_unknown_method_tells_of_the_plugin_that_failed(install: Callable[..., None]) -> None:
    install(Point("bad", import_failure, SimpleNamespace(name="bad-dist", version="9.9")))
    with pytest.warns(PluginWarning), pytest.raises(UnknownMethod, match=r"bad-dist 9\.9.*missing_dependency"):
        peftcore.method("whatever")


def test_name_of_an_entry_point_counts_once(install: Callable[..., None]) -> None:
    other = plugin({"other": "core_toys:Shift"})
    install(point("same", plugin(), "first-dist", "1.0"), point("same", other, "second-dist", "2.0"))
    with pytest.warns(PluginWarning, match=r"second-dist 2\.0.*taken by first-dist 1\.0"):
        listed = names()
    assert listed == ["toy_doubling"]


@pytest.mark.parametrize("name", ["peftcore.core_plugin", "registered"])
def test_entry_point_cannot_take_a_name_that_the_core_uses(name: str, install: Callable[..., None]) -> None:
    install(point(name, plugin({"other": "core_toys:Shift"}), "bold-dist", "1.0"), point("good", plugin()))
    with pytest.warns(PluginWarning, match=r"bold-dist 1\.0"):
        listed = names()
    assert listed == ["toy_doubling"]
    peftcore.apply(perceptron(), "toy_doubling", target="first")


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


def test_disabled_plugins_are_not_even_imported(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCORE_DISABLE", "bad, worse")
    install(Point("bad", import_failure), Point("worse", any_failure), point("good", plugin()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        listed = names()
    assert listed == ["toy_doubling"]


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
    install()
    with pytest.raises(UnknownMethod, match=f"pip install .*{package}"):
        peftcore.apply(perceptron(), name, target="first")


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


class AliasedConfig(MethodConfig):
    """No options."""

    method: Literal["toy_long_name"] = "toy_long_name"


class Aliased(Method):
    name = "toy_long_name"
    aliases = ("toy_short",)
    Config = AliasedConfig
    tags = Tags(category="additive", paper="none")
    target = "first"

    def inject(self, model: Any, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.replace(site)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 0


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


def method_members() -> dict[str, Any]:
    return {
        "name": "toy_made",
        "Config": DoublingConfig,
        "tags": Tags(category="additive", paper="none"),
        "target": "attn.q",
        "inject": lambda self, model, config, surgeon: None,
        "parameter_count": staticmethod(lambda site, config: 0),
    }


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
