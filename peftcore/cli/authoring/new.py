"""The work of ``peftcore new``: writes a new plugin package, completely or not at all.

The templates of the files are in `templates/`: in the folder `common`, and in one folder for each kind of plugin. The
folders have the same structure as the package. PACKAGE and NAME in their paths are replaced by the plugin's names.
`steps.txt`, the next steps for the author, is printed instead of written.
"""

from __future__ import annotations

import ast
import importlib.util
import keyword
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Group, RenderableType
from rich.padding import Padding

import peftcore
from peftcore.author import API
from peftcore.cli import pages
from peftcore.contract.method import CATEGORIES
from peftcore.errors import BadInput
from peftcore.files.safe_io import discard
from peftcore.registry.plugins import RESERVED, registry

TREES = Path(__file__).parent / "templates"
SUFFIX = ".jinja"
STEPS = "steps.txt"
SHAPE = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
LONGEST = 28
"""The largest number of characters of a name, so that lines of the templates do not get too long."""


@dataclass(frozen=True)
class NewPlugin:
    """The plugin package to write.

    Attributes:
        given: the name that the user passed.
        template: "method" or "quantizer".
        activations: True if the method changes activations, False if it changes weights.
        category: one of `CATEGORIES`.
    """

    given: str
    template: str = "method"
    activations: bool = False
    category: str = "reparameterized"

    @property
    def name(self) -> str:
        """The name as a Python identifier. The method, its module and the entry point have it."""
        return self.given.replace("-", "_")

    @property
    def distribution(self) -> str:
        """The name of the distribution, for pip."""
        return f"peftcore-{self.scheme}"

    @property
    def scheme(self) -> str:
        """The name of the quantization scheme, as passed to `peftcore.quantize`."""
        return self.name.replace("_", "-")

    @property
    def package(self) -> str:
        """The name of the Python package, to import."""
        return f"peftcore_{self.name}"

    def check(self) -> None:
        """Check that the name is valid, and that no installed distribution uses it.

        Raises:
            BadInput: the name is invalid or taken; the message says why.
        """
        if not SHAPE.fullmatch(self.given) or len(self.given) > LONGEST:
            raise BadInput(
                f"{self.given!r} is not a name for a {self.template}: use lower case letters, digits and single "
                f"dashes, a letter first, at most {LONGEST} characters; such as my-method"
            )
        if self.name.split("_")[0] == "peftcore":
            raise BadInput(f"{self.given!r}: remove peftcore, the package is called peftcore-NAME anyway")
        if keyword.iskeyword(self.name) or _clashes(self.files()[f"{self.package}/{self.name}.py"]):
            raise BadInput(f"{self.given!r} is reserved in Python or in peftcore; choose another name")
        if self.name in CATEGORIES or self.scheme in RESERVED or self.name in RESERVED:
            raise BadInput(f"{self.given!r} is a plugin of peftcore itself; choose another name")
        for owner, what, names in _installed():
            if self.name in names or self.scheme in names:
                raise BadInput(f"{owner} has a {what} called {self.given!r} already; choose another name")
        if importlib.util.find_spec(self.package) is not None:
            raise BadInput(f"a package called {self.package} is installed already; choose another name")

    def files(self) -> Mapping[str, str]:
        """Return the texts of all files of the package, keyed by path."""
        trees = [TREES / "common", TREES / self.template]
        environment = Environment(loader=FileSystemLoader(trees), undefined=StrictUndefined, keep_trailing_newline=True)
        environment.trim_blocks = environment.lstrip_blocks = True
        values = {
            **{key: getattr(self, key) for key in ("name", "scheme", "package", "distribution", "template")},
            "activations": self.activations,
            "category": self.category,
            "class_name": "".join(part.title() for part in self.name.split("_")),
            "title": " ".join(part.capitalize() for part in self.name.split("_")),
            "entry_point": self.package if self.template == "method" else f"{self.package}.{self.name}",
            "api": API,
            "peftcore_version": peftcore.__version__.rpartition(".")[0],
            "author": _author() or f"the authors of {self.distribution}",
            "year": date.today().year,
        }
        return {
            name.removesuffix(SUFFIX).replace("PACKAGE", self.package).replace("NAME", self.name): text
            for name in environment.list_templates()
            for text in [environment.get_template(name).render(values)]
        }


def _clashes(text: str) -> bool:
    """Whether a module defines a class with the same name as something that it imports."""
    body = ast.parse(text).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.name for node in imports for alias in node.names}
    return not imported.isdisjoint(node.name for node in body if isinstance(node, ast.ClassDef))


def _installed() -> Iterator[tuple[str, str, set[str]]]:
    """Yield the names that are taken, with the distribution and the kind of thing (plugin, method or scheme) that has
    them."""
    for plugin in registry().plugins.values():
        yield plugin.distribution, "plugin", {plugin.name}
    for info in peftcore.methods():
        yield info.distribution, "method", {info.name, *info.aliases}
    for name, place in peftcore.schemes().items():
        yield place.partition(".")[0], "scheme", {name}


def _author() -> str:
    """Return the user's name in git's configuration; empty if there is none."""
    git = shutil.which("git")
    if git is None:
        return ""
    done = subprocess.run([git, "config", "user.name"], capture_output=True, text=True, check=False)
    return "".join(each for each in done.stdout.strip() if each.isprintable())


def write(plugin: NewPlugin, folder: Path) -> RenderableType:
    """Write the package into a new or empty folder. Returns the next steps for the author, to print.

    Raises:
        BadInput: the name is taken, or the folder is not empty or cannot be written; nothing was written.
    """
    plugin.check()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} {'is not empty' if folder.is_dir() else 'is a file'}; choose another --folder")
    files = dict(plugin.files())
    steps = files.pop(STEPS)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        for name, text in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.rename(partial, folder)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written to ({error.strerror})") from error
    finally:
        discard(partial)
    return _next(plugin, folder, steps)


def _next(plugin: NewPlugin, folder: Path, steps: str) -> RenderableType:
    table = pages.columns("", "", "", header=False)
    for number, step in enumerate([f"cd {folder} | ", *steps.splitlines()], 1):
        where, _, what = step.partition(" | ")
        table.add_row(str(number), where, what)
    return Group(
        f"{folder}: {plugin.distribution}, a {plugin.template} that is complete. Next:", Padding(table, (1, 2))
    )
