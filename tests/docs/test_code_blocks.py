"""Every python block in README and docs runs, in page order, and between them the commands that cost little; what
claims to be a file is the text of that file."""

import ast
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from doc_pages import DOCS, ROOT, Block, blocks, name, of_peftcore
from hub_stand_ins import named_in, stand_in
from typer.testing import CliRunner

from peftcore.cli.commands import app
from peftcore.registry import catalogue
from peftcore.registry.plugins import registry

LANGUAGES = {"python", "bash", "yaml", "toml", "json", "markdown", "text", ""}
READERS = {"python": ast.parse, "yaml": yaml.safe_load, "toml": tomllib.loads, "json": json.loads}
STARTS = ("peftcore ", "pip ", "make ", "python ", "torchrun ", "accelerate ", "import ", "from ", "def ", "class ")
"""How lines of code begin, in blocks that say that they are none."""
DEAR = {"--demo", "--sizes"}
FILES = (".csv", ".jsonl", ".yaml", ".safetensors")
LONG = {"serving", "start", "training", "write-a-method"}
"""Pages whose blocks train for seconds, which `make test-slow` runs."""
RUN_WHOLE = [ROOT / "docs/start.md"]
"""Pages of which every command runs, but the dear ones."""
PAGES = [
    page for page in [*DOCS, ROOT / "CONTRIBUTING.md"] if any(block.language == "python" for block in blocks(page))
]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """Where a page runs: a module, since what it defines may be pickled, in a folder of its own. What it registers is
    gone afterwards."""
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    monkeypatch.setattr(catalogue, "_registered", dict(catalogue._registered))
    monkeypatch.chdir(tmp_path)  # blocks may write files
    before = registry().manager.get_plugins()
    yield page
    assert registry().manager.get_plugins() == before, "a page leaves a plugin behind"


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub, empty at first."""
    return tmp_path_factory.mktemp("hub")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.stem in LONG else (), id=name(page)) for page in PAGES],
)
def test_blocks_run(page: Path, module: ModuleType, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the hub that a page names are small ones here."""
    for model in named_in(page.read_text(encoding="utf-8")):
        stand_in(hub, model)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    left = []
    for number, block in enumerate(blocks(page), 1):
        if block.language == "python":
            exec(compile(block.text, f"{page.name}, block {number}", "exec"), vars(module))
        elif block.language == "bash":
            left += [line for line in block.commands() if not _ran(line)]
    assert page not in RUN_WHOLE or not [line for line in left if of_peftcore(line) and not DEAR & set(line)]


def _ran(line: list[str]) -> bool:
    """Run a command of ours in this process, if all that it names is there and it costs little."""
    words = of_peftcore(line)
    if words is None or DEAR & set(words) or any(word.isupper() for word in words):
        return False
    if any(word.endswith(FILES) and not Path(word).exists() for word in words):
        return False
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{' '.join(line)}\n{result.output}"
    return True


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_every_block_says_what_it_is(page: Path) -> None:
    """A block without a language, or of text, is no code."""
    found = blocks(page)
    assert {block.language for block in found} <= LANGUAGES
    for block in found:
        READERS.get(block.language, str)(block.text)
    plain = [block for block in found if block.language in ("", "text")]
    assert not [line for block in plain for line in block.text.splitlines() if line.lstrip().startswith(STARTS)]


def test_a_block_of_code_without_a_language_is_seen() -> None:
    assert "pip install x".startswith(STARTS) and not "y = W x + b".startswith(STARTS)
    assert list(Block("bash", "peftcore show \\\n  lora  # why\n").commands()) == [["peftcore", "show", "lora"]]


def test_readme_method_is_the_example() -> None:
    """The method in the README is the one of the third-party example: same code, comments and docstrings aside."""
    example = ROOT / "examples/third-party-plugin/peftcore_example_scale/diag_scale.py"
    shown = next(block.text for block in blocks(ROOT / "README.md") if "class DiagScaleOperator" in block.text)
    assert _calls(shown) == _calls(example.read_text(encoding="utf-8"))


def _calls(code: str) -> list[str]:
    """The expressions that a method computes: what must not drift apart."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call | ast.BinOp)]
