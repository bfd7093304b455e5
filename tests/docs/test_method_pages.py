"""The page of a method: its snippet runs as a reader would paste it, and it says all that the method declares."""

from pathlib import Path
from typing import Any

import pytest

import facts
import method_pages
import peftcore
import snippets
import taxonomy
from links import copies, mended
from peftcore.author import Method, MethodConfig, Tags

NAMES = [info.name for info in peftcore.methods()]
BUDGETS = {"BERT base": 1000}


@pytest.mark.share(4)
@pytest.mark.parametrize("name", NAMES)
def test_snippet_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves the adapter, and where something trains, the step has reached it."""
    monkeypatch.chdir(tmp_path)
    method = peftcore.method(name)
    assert snippets.plan(method, snippets.host(method)), (
        f"{name} has no place in a host of the snippets: give an example"
    )
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(snippets.snippet(method), f"snippet of {name}", "exec"), names)
    assert (tmp_path / "adapter/adapter.json").exists()
    trained = (
        [each for group in names["optimizer"].param_groups for each in group["params"]] if "optimizer" in names else []
    )
    assert trained or method.tags.category == "quantized"  # corrections of a packed base need not train
    assert not trained or any(each.grad is not None and each.grad.abs().sum() > 0 for each in trained)


class Told(Method):
    """A method that says how it is used.

    Example:
        injection = peftcore.apply(model, "told", rank=3)
        peftcore.call(model, number=3)
    """

    name = "told"
    Config = MethodConfig
    tags = Tags(category="additive", paper="none")
    target = ("attn.q",)

    def inject(self, model: Any, config: Any, surgeon: Any) -> None:
        """Nothing."""

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        """None."""
        return 0


def test_an_example_of_the_class_takes_the_place_of_the_line_that_applies() -> None:
    text = snippets.snippet(Told)
    assert snippets.options(Told) == {"rank": 3}
    assert 'injection = peftcore.apply(model, "told", rank=3)\npeftcore.call(model, number=3)\n' in text
    assert text.count("peftcore.apply(") == 1


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of methods without plans in large models, and without what is kept of them."""
    monkeypatch.setattr(facts.Facts, "budgets", BUDGETS)
    found = {"snippet": "import peftcore\n", "host": "a host", "way": facts.UPDATES, "parts": []}
    monkeypatch.setattr(facts.Facts, "_found", found)
    monkeypatch.setattr(facts, "sizes", lambda: {"BERT base": 100_000})
    monkeypatch.setattr(facts.Facts, "drawing", "<svg></svg>")


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("name", ["lora", "config_union", "svdiff"])
def test_page_says_what_the_method_declares(name: str) -> None:
    method = facts.named(name)
    assert method
    text = method_pages.page(method)
    options = [option for option in method.cls.Config.model_fields if option != "method"]
    assert all(f"<td><code>{option}</code></td>" in text for option in options)
    assert method.shown.link in text and "1 %" in text and method.source in text
    assert ("checked against" if method.checked else "equation only") in text


@pytest.mark.usefixtures("pages")
def test_figure_has_every_method_and_what_filters_ask() -> None:
    text = taxonomy.page()
    assert [name for name in NAMES if f'<a href="{name}.html">' not in text] == []
    assert text.count("data-budgets=") == len(NAMES)


@pytest.mark.parametrize(
    ("source", "page", "text", "expected"),
    [
        ("docs/start.md", "start.md", "[C](../CONTRIBUTING.md#style)", "[C](CONTRIBUTING.md#style)"),
        ("docs/start.md", "start.md", "[p](../examples/third-party-plugin/)", "[p](examples/third-party-plugin.md)"),
        ("docs/start.md", "start.md", "[home](../README.md#examples)", "[home](index.md#examples)"),
        ("docs/files.md", "files.md", "[code](../peftcore/files/safe_io.py)", "code (`peftcore/files/safe_io.py`)"),
        (
            "docs/decisions/001.md",
            "decisions/001.md",
            "[a](../files.md) [b](https://c.d)",
            "[a](../files.md) [b](https://c.d)",
        ),
        ("README.md", "index.md", "[d](docs/start.md#install)", "[d](start.md#install)"),
        ("README.md", "index.md", "![d](docs/assets/a.png)", "![d](assets/a.png)"),
        ("examples/tweets/README.md", "examples/tweets.md", "[t](../../docs/training.md)", "[t](../training.md)"),
        ("docs/a.md", "a.md", "```\n[x](../README.md)\n```", "```\n[x](../README.md)\n```"),
    ],
)
def test_links_hold_in_the_site(source: str, page: str, text: str, expected: str) -> None:
    assert mended(text, source, page) == expected


def test_every_example_has_a_page() -> None:
    root = Path(__file__).parents[2]
    assert {each.relative_to(root).as_posix() for each in root.glob("examples/*/README.md")} <= set(copies())


def test_a_base_is_packed_after_its_method() -> None:
    text = snippets.snippet(peftcore.method("qlora"))
    assert text.index("peftcore.apply(") < text.index('peftcore.quantize(model, "nf4", double_quant=True)')
