"""`peftcore new`: what it writes installs, is clean, and passes the kit; and what it refuses leaves nothing behind."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

import peftcore
from peftcore.cli.authoring.new import LONGEST
from peftcore.cli.commands import app
from peftcore.testing.kit import ALL

ROOT = Path(__file__).parents[2]
LONG = "".join(chr(ord("a") + i) for i in range(26)).ljust(LONGEST, "z")
PLUGINS = {
    "my-method": (),
    "my-gains": ("--activations",),
    "my-format": ("--template", "quantizer"),
}
AT_THE_LIMITS = {"m": (), LONG: (), f"{LONG[:-1]}a": ("--activations",), f"{LONG[:-1]}b": ("--template", "quantizer")}
"""Names with which lines are as short and as long as they can be."""
QUICK = "not compiled and not (my-gains and (llama or task))"
"""What takes most of the time is left out: compilers, and of the second method all but the hosts of torch alone."""


def new(name: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["new", name, *options])


def named(name: str) -> str:
    return name.replace("-", "_")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plugin of each kind."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, options in {**PLUGINS, **AT_THE_LIMITS}.items():
        made = new(name, *options, "--folder", str(folder / name))
        assert made.exit_code == 0, made.output
    return folder


def run(*command: object, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ)
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [env.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def checked(*command: object, cwd: Path, path: Path | None = None) -> str:
    done = run(*command, cwd=cwd, path=path)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# What is written


def test_it_says_what_to_write_next() -> None:
    made = new("my-method")
    steps = [line.split() for line in made.output.splitlines() if re.match(r"  \d+  ", line)]
    assert [int(step[0]) for step in steps] == list(range(1, len(steps) + 1)) and len(steps) >= 5
    assert steps[0][1:3] == ["cd", "peftcore-my-method"]
    pointed = [step[1] for step in steps if step[1].endswith(".py")]
    assert pointed and all(Path("peftcore-my-method", each).is_file() for each in pointed)


@pytest.mark.parametrize("name", PLUGINS)
def test_all_that_a_package_needs_is_there(written: Path, name: str) -> None:
    folder, package = written / name, f"peftcore_{named(name)}"
    for each in ("README.md", "LICENSE", ".gitignore", f"{package}/py.typed", "tests/test_conformance.py"):
        assert (folder / each).is_file()
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == f"peftcore-{name}"
    assert list(project["entry-points"]["peftcore"]) == [named(name)]
    workflow = yaml.safe_load((folder / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    steps = [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert {"pip install -e '.[dev]'", "ruff check .", "mypy", "pytest"} <= set(steps)
    for path in folder.rglob("*"):
        if path.is_file():
            assert not re.search(r"(?<!\$)\{\{|\{%", path.read_text(encoding="utf-8")), path


def test_who_wrote_it_is_the_name_that_git_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text('[user]\n\tname = Ada \\"L\\" Lovelace\n', encoding="utf-8")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    assert new("my-method").exit_code == 0
    folder = tmp_path / "peftcore-my-method"
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["authors"] == [{"name": 'Ada "L" Lovelace'}]
    assert re.search(r'Copyright 20\d\d Ada "L" Lovelace\n', (folder / "LICENSE").read_text(encoding="utf-8"))


def test_linters_have_nothing_to_say(written: Path) -> None:
    for name in (*PLUGINS, *AT_THE_LIMITS):
        checked("ruff", "check", "--no-cache", ".", cwd=written / name)
        checked("ruff", "format", "--no-cache", "--check", ".", cwd=written / name)


@pytest.mark.skipif(os.environ.get(ALL) != "1", reason="mypy reads all of torch first: a part of `make test-all`")
def test_types_are_right(written: Path) -> None:
    for name in PLUGINS:
        checked("mypy", "--cache-dir", written / ".mypy_cache", cwd=written / name)


@pytest.mark.slow
def test_it_installs_and_passes_the_kit(written: Path) -> None:
    site = written / "site-packages"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", site)
    checked("pip", *install, *(written / name for name in PLUGINS), cwd=written)
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={written}", "-k", QUICK)
    report = checked("pytest", *options, *(f"{name}/tests" for name in PLUGINS), cwd=written, path=site)
    found = re.search(r"(\d+) passed, (\d+) skipped, (\d+) deselected", report)
    assert found, report
    passed, skipped, deselected = map(int, found.groups())
    assert passed > 240 and skipped < passed / 40 and deselected > 60, (
        report
    )  # skipped: an option and a package that are not had


# The place for numbers of somebody else


@pytest.fixture
def imported(written: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Imports a file of a plugin, with a part of its text changed."""

    def load(path: str, old: str = "", new: str = "") -> ModuleType:
        text = (written / path).read_text(encoding="utf-8")
        assert old in text
        module = ModuleType(Path(path).stem)
        monkeypatch.setitem(sys.modules, module.__name__, module)  # pydantic looks types up there
        exec(compile(text.replace(old, new, 1) if old else text, path, "exec"), vars(module))
        return module

    return load


@pytest.mark.parametrize(
    ("name", "old", "changed"),
    [
        ("my-method", "return self.gain * weight", "return self.gain.abs() * weight"),
        (
            "my-gains",
            "return y * self.layer.along_channels(gain, y)",
            "return y * self.layer.along_channels(gain, y) + y",
        ),
    ],
)
def test_an_operator_that_is_changed_alone_fails_the_equation(
    imported: Callable[..., ModuleType], name: str, old: str, changed: str
) -> None:
    package, class_name = f"{name}/peftcore_{named(name)}/{named(name)}.py", name.title().replace("-", "")
    equation = imported(f"{name}/tests/test_equation.py")
    peftcore.register(vars(imported(package))[class_name])
    equation.test_outputs_are_those_of_the_equation()
    peftcore.register(vars(imported(package, old, changed))[class_name])
    with pytest.raises(AssertionError, match="not close"):
        equation.test_outputs_are_those_of_the_equation()


def test_a_format_that_is_changed_alone_fails_the_equation(imported: Callable[..., ModuleType]) -> None:
    package, test = "my-format/peftcore_my_format/my_format.py", imported("my-format/tests/test_format.py")
    for old, changed in (("", ""), (".round()", ".floor()")):
        module: Any = imported(package, old, changed)
        vars(test)["scheme"] = lambda name, module=module, **options: module.MyFormat(**options)
        if not old:
            test.test_weights_are_those_of_the_equation()
        else:
            with pytest.raises(AssertionError, match="not close"):
                test.test_weights_are_those_of_the_equation()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["MyMethod"], "lower case"),
        (["4bit"], "a letter first"),
        ([""], "such as my-method"),
        (["my--method"], "single dashes"),
        (["../my-method"], "lower case"),
        ([LONG + "z"], f"at most {LONGEST}"),
        (["peftcore-mine"], "remove peftcore"),
        (["class"], "is reserved in Python"),
        (["tensor"], "is reserved in Python"),
        (["weight"], "is reserved in Python"),
        (["field", "--template", "quantizer"], "is reserved in Python"),
        (["registered"], "peftcore itself"),
        (["vision"], "peftcore itself"),
        (["lora"], "peftcore-reparameterized"),
        (["prefix-tuning"], "peftcore-additive"),
        (["nf4", "--template", "quantizer"], "scheme called 'nf4'"),
        (["torchao", "--template", "quantizer"], "plugin called 'torchao'"),
        (["my-method", "--category", "new"], "no category 'new'"),
        (["my-format", "--template", "quantizer", "--weights"], "remove them for a quantizer"),
    ],
)
def test_what_cannot_be_is_one_error(arguments: list[str], why: str, tmp_path: Path) -> None:
    made = new(*arguments)
    assert made.exit_code == 2
    assert made.stderr.startswith("Error: ") and made.stderr.count("\n") == 1 and why in made.stderr
    assert not any(tmp_path.iterdir())


def test_an_installed_package_is_not_shadowed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find("json") if name == "peftcore_my_method" else find(name)
    )
    assert "peftcore_my_method is installed already" in new("my-method").stderr


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_stays(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "mine"
    kept = place / "notes.txt" if kind == "folder" else place
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine", encoding="utf-8")
    made = new("my-method", "--folder", str(place))
    assert made.exit_code == 2 and f"{place} is" in made.stderr and "choose another --folder" in made.stderr
    assert kept.read_text(encoding="utf-8") == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(Path, "write_text", full)
    made = new("my-method", "--folder", "empty")
    assert made.exit_code == 2 and "No space left on device" in made.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
