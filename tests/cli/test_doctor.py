"""`peftcore doctor`: what is installed, what is broken, and the exit code that scripts read."""

import importlib.metadata
import importlib.util
import json
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import peftcore
import peftcore.registry.catalogue
import peftcore.registry.plugins
from peftcore.author import hookimpl
from peftcore.cli.commands import app

LORA = "peftcore_reparameterized.lora:LoRA"


def doctor(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stderr == ""
    return result.exit_code, result.stdout


def findings() -> tuple[int, dict[str, Any]]:
    code, text = doctor("--json")
    return code, json.loads(text)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Plugins beside those that are installed: by name, what loading them does."""
    installed = importlib.metadata.entry_points(group=peftcore.registry.plugins.GROUP)

    def forget() -> None:
        peftcore.registry.plugins.registry.cache_clear()
        peftcore.registry.catalogue._loaded.clear()

    def add(**loads: Callable[[], Any]) -> None:
        dist = SimpleNamespace(name="other-dist", version="3.1")
        points = [SimpleNamespace(name=name, load=load, dist=dist, value="v") for name, load in loads.items()]
        monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: [*installed, *points])
        forget()

    yield add
    monkeypatch.undo()
    forget()


def plugin(**methods: str) -> Callable[[], types.ModuleType]:
    module = types.ModuleType("other_plugin")
    module.PEFTCORE_API = peftcore.author.API
    module.peftcore_methods = hookimpl(lambda: methods)
    return lambda: module


def broken() -> Any:
    raise ImportError("no module named 'elsewhere'")


def test_all_is_well() -> None:
    code, found = findings()
    assert (code, found["healthy"], found["broken"], found["ambiguous"]) == (0, True, [], [])
    assert {"additive", "reparameterized", "vision"} <= {each["name"] for each in found["plugins"]}
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["versions"]["peftcore-hybrid"] == importlib.metadata.version("peftcore-hybrid")
    assert {"nf4", "int8"} <= {each["name"] for each in found["schemes"]}
    assert any(each.startswith("cpu") for each in found["devices"])
    assert any((each["distribution"], each["extra"]) == ("peftcore", "cli") for each in found["needs"])


def test_a_broken_plugin_is_named_with_its_error(install: Callable[..., None]) -> None:
    install(faulty=broken)
    code, text = doctor()
    assert code == 1
    assert "broken: faulty (other-dist 3.1): ImportError: no module named 'elsewhere'" in text
    assert "Not all is well" in text
    assert findings()[1]["healthy"] is False


def test_an_installation_without_methods_is_not_well(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {point.name for point in importlib.metadata.entry_points(group=peftcore.registry.plugins.GROUP)}
    monkeypatch.setenv(peftcore.registry.plugins.DISABLE, ",".join(names))
    install()
    code, text = doctor()
    assert code == 1
    assert "There are no methods: pip install 'peftcore[all]'" in text


def test_a_plugin_whose_name_is_taken(install: Callable[..., None]) -> None:
    install(additive=plugin(toy=LORA))
    code, found = findings()
    assert (code, [each["name"] for each in found["broken"]]) == (1, ["additive"])
    assert "taken by" in found["broken"][0]["reason"]


def test_a_method_that_cannot_be_imported(install: Callable[..., None]) -> None:
    install(extra=plugin(toy="no_such_module:Toy"))
    code, found = findings()
    assert (code, [each["name"] for each in found["broken"]]) == (1, ["extra/toy"])


def test_a_name_that_means_two_methods(install: Callable[..., None]) -> None:
    install(extra=plugin(lora=LORA))
    code, found = findings()
    assert (code, found["broken"]) == (1, [])
    assert found["ambiguous"] == [{"name": "lora", "write": ["extra/lora", "reparameterized/lora"]}]
    assert "ambiguous: lora; write extra/lora or reparameterized/lora" in doctor()[1]


def test_a_plugin_that_is_switched_off(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install(faulty=broken)
    monkeypatch.setenv(peftcore.registry.plugins.DISABLE, "faulty, vision")
    code, found = findings()
    assert (code, found["disabled"]) == (0, ["faulty", "vision"])
    assert "vision" not in {each["name"] for each in found["plugins"]}


def test_missing_packages_come_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    version, find = importlib.metadata.version, importlib.util.find_spec

    def old_or_gone(name: str) -> str:
        if name in ("bitsandbytes", "timm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "torchao" else version(name)

    monkeypatch.setattr("importlib.metadata.version", old_or_gone)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
    code, found = findings()
    assert code == 0
    needs = {each["extra"]: each for each in found["needs"] if each["distribution"] == "peftcore-quantized"}
    assert needs["bitsandbytes"]["install"] == "pip install 'peftcore-quantized[bitsandbytes]'"
    assert {"bitsandbytes", "torchao"} <= {extra for extra, each in needs.items() if each["missing"]}
    assert needs["torchao"]["missing"][0].startswith("torchao>=")
    schemes = {each["name"]: each for each in found["schemes"]}
    assert schemes["bnb-nf4"]["missing"] == ["bitsandbytes"] and not schemes["nf4"]["missing"]
    text = doctor()[1]
    assert "not installed: pip install timm" in text
    assert "Run: pip install 'peftcore-quantized[bitsandbytes]'" in text
