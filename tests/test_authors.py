"""What is written by authors, of methods, quantizers and plugins, imports `peftcore`, `peftcore.author` and
`peftcore.errors` alone; readers and writers of files import `peftcore.author.formats` too.

So do the files that we write as authors: all plugins, the example of a plugin, the snippets of the pages, and the
templates of `peftcore new`. Where such a file needs what is further down, a verb is missing in the public API.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import peftcore
import peftcore.author

ROOT = Path(__file__).parents[1]
LAB = "lab"
"""The plugin that brings commands and no methods: an application, which may import all of the core."""
PLUGINS = sorted(path for path in ROOT.glob("plugins/*/peftcore_*/**/*.py") if f"peftcore_{LAB}" not in path.parts)
EXAMPLE = sorted(ROOT.glob("examples/third-party-plugin/**/*.py"))
TEMPLATES = sorted(ROOT.glob("peftcore/cli/authoring/templates/**/*.py.jinja"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("plugins/*/README.md"))
FILES = [*PLUGINS, *EXAMPLE, *TEMPLATES, *PAGES]

FOR_AUTHORS = {"peftcore", "peftcore.author", "peftcore.author.formats", "peftcore.errors"}
BESIDES = {"peftcore.testing", "peftcore.training", "peftcore.roles", "peftcore.compat"}
"""For tests, for who trains, for who corrects a map of roles, and for who comes from peft: what pages and tests show,
and no method needs."""
PUBLIC = {f"peftcore.{name}" for name in (*peftcore.__all__, "__version__")}
PUBLIC |= {f"peftcore.author.{name}" for name in peftcore.author.__all__}
SNIPPET = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^ *```", re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sources(path: Path) -> Iterator[tuple[int, str]]:
    """The Python in a file, each piece with the number of lines before it."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        for found in SNIPPET.finditer(text):
            yield text.count("\n", 0, found.start("code")), textwrap.dedent(found["code"])
    elif path.suffix == ".jinja":
        yield 0, re.sub(r"\{\{(.*?)\}\}", filled_in, re.sub(r"\{%.*?%\}", "", text))
    else:
        yield 0, text


def filled_in(expression: re.Match[str]) -> str:
    """All that an expression of a template may put there: of a choice, both texts."""
    return ", ".join(re.findall(r'"(.*?)"', expression[1])) or "name"


def reached(source: str) -> Iterator[tuple[int, str]]:
    """What a piece of Python reaches for in the core, anywhere in it, by line: ``peftcore``, ``peftcore.author.Site``,
    ``peftcore.errors``, or what it should not: ``peftcore.layers.layer``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "peftcore":
            yield from ((node.lineno, f"peftcore.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.lineno, node.module
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "peftcore":
            yield node.lineno, f"peftcore.{node.attr}"


def strays(path: Path, allowed: set[str]) -> list[str]:
    """Each place where a file reaches below the public API."""
    public = PUBLIC | allowed
    return [
        f"{relative(path)}:{before + line} {name}"
        for before, source in sources(path)
        for line, name in reached(source)
        if name.partition(".")[0] == "peftcore" and name not in public
    ]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_authors_import_the_public_api_alone(path: Path) -> None:
    read_by_users = path in PAGES or "tests" in path.parts
    assert not strays(path, FOR_AUTHORS | BESIDES if read_by_users else FOR_AUTHORS)


def test_all_kinds_of_files_are_read() -> None:
    """Otherwise the test above would hold of nothing."""
    folders = {path.name for path in (ROOT / "plugins").iterdir()}
    assert {path.parts[len(ROOT.parts) + 1] for path in PLUGINS} == folders - {LAB}
    assert EXAMPLE and TEMPLATES
    assert any(name == "peftcore.author" for page in PAGES for _, text in sources(page) for _, name in reached(text))


@pytest.mark.parametrize(
    "line",
    [
        "from peftcore.layers.layer import Layer",
        "import peftcore.layers.layer",
        "from peftcore import layers",
        "def late():\n    from peftcore.layers import layer",
        "if TYPE_CHECKING:\n    from peftcore.layers.layer import Layer",
        "import peftcore\nLayer = peftcore.layers.layer.Layer",
    ],
)
def test_what_reaches_further_down_is_seen(line: str) -> None:
    public = PUBLIC | FOR_AUTHORS
    assert any(name.startswith("peftcore.layers") and name not in public for _, name in reached(line))


def test_the_package_shows_its_public_api_and_nothing_else() -> None:
    """Modules that imports leave in the package do not show."""
    assert dir(peftcore) == sorted(peftcore.__all__)
    assert all(hasattr(peftcore, name) for name in dir(peftcore))
