"""Commands of plugins: beside the core's, each plugin's by themselves, and never in the place of another's."""

from collections.abc import Callable
from typing import Any

import pytest
import typer
from plugin_toys import plugin, point
from typer.testing import CliRunner

import peftcore.registry.plugins
import peftcore.utils.packages
from peftcore.author import hookimpl
from peftcore.cli.app import OF_LAB
from peftcore.cli.commands import app
from peftcore.registry.plugins import PluginWarning

Install = Callable[..., None]


def adding(add: Callable[[typer.Typer], object]) -> Any:
    """A plugin whose hook calls a function."""
    return plugin({}, peftcore_commands=hookimpl(lambda app: add(app)))


def bringing(name: str, says: str) -> Any:
    """A plugin with one command."""
    return adding(lambda app: app.command(name)(lambda: print(says)))


@pytest.fixture
def install(fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put plugins in the place of those that are installed."""

    def replace(**modules: Any) -> None:
        points = [point(name, module) for name, module in modules.items()]
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
        peftcore.registry.plugins.registry.cache_clear()

    return replace


def run(*words: str) -> Any:
    return CliRunner().invoke(app, [*words])


def test_a_plugin_adds_a_command(install: Install) -> None:
    install(one=bringing("hum", "hmm"), two=bringing("sing", "la"))
    assert (run("hum").output, run("sing").output) == ("hmm\n", "la\n")
    listed = run("--help").output
    assert listed.index("doctor") < listed.index("hum")  # after the core's


def test_a_group_of_commands(install: Install) -> None:
    def add(app: typer.Typer) -> None:
        group = typer.Typer()
        group.command("low")(lambda: print("mmm"))
        group.command("high")(lambda: print("iii"))
        app.add_typer(group, name="hum")

    install(one=adding(add))
    assert run("hum", "high").output == "iii\n"


@pytest.mark.parametrize(("taken", "owner"), [("methods", "peftcore itself"), ("hum", "first")])
def test_a_name_that_is_taken_is_refused_and_all_else_works(install: Install, taken: str, owner: str) -> None:
    def add(app: typer.Typer) -> None:
        app.command(taken)(lambda: print("mine"))
        app.command("another")(lambda: print("mine"))

    install(first=bringing("hum", "hmm"), second=adding(add))
    with pytest.warns(PluginWarning, match=f"'second'.*its command '{taken}' is taken by {owner}"):
        assert run("hum").output == "hmm\n"
    assert "mine" not in run(taken).output
    assert run("another").exit_code == 2
    assert "second" in {each.name for each in peftcore.registry.plugins.registry().failures}


def test_an_error_of_a_plugin_is_its_own(install: Install) -> None:
    def add(app: typer.Typer) -> None:
        raise ValueError("out of tune")

    install(bad=adding(add), good=bringing("hum", "hmm"))
    with pytest.warns(PluginWarning, match=r"'bad'.*out of tune"):
        assert run("hum").output == "hmm\n"
    assert run("hum").output == "hmm\n"  # without another warning


def test_a_typing_error_is_answered_with_a_command_of_a_plugin(install: Install) -> None:
    install(one=bringing("sing", "la"))
    found = run("sign")
    assert found.exit_code == 2 and "'sing'" in found.output


@pytest.mark.parametrize("name", OF_LAB)
def test_without_the_lab_its_commands_say_how_to_install_it(
    install: Install, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    install()
    monkeypatch.setattr(peftcore.utils.packages, "has_lab", lambda: False)
    found = run(name, "--demo")
    assert (found.exit_code, found.stdout) == (2, "")
    said = f"peftcore {name} is part of peftcore-lab, which is not installed. Run: pip install peftcore-lab"
    assert found.stderr == f"Error: {said}\n"


def test_a_lab_that_is_not_loaded_is_told_of(install: Install) -> None:
    install()
    assert "whose plugin was not loaded: run peftcore doctor" in run("train").stderr
    found = run("schema", "train")
    assert found.exit_code == 2 and "whose plugin was not loaded" in found.stderr
