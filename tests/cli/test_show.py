"""`peftcore show` and `peftcore schema`: what a method says about itself."""

import json
import re
from typing import Any

import pytest
from pydantic import Field
from typer.testing import CliRunner

import peftcore
from peftcore.authoring.budgets import budgets
from peftcore.cli.commands import app
from peftcore.cli.inspection.show import MethodDescription, Option, options_table, paragraphs, section
from peftcore.cli.pages import console
from peftcore.registry.method_text import HEADINGS


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_method_as_json() -> None:
    found = json.loads(printed("show", "lora", "--json"))
    cls = peftcore.method("lora")
    assert (found["name"], found["plugin"], found["category"]) == ("lora", "reparameterized", "reparameterized")
    assert found["link"] == "https://arxiv.org/abs/2106.09685"
    assert found["tags"]["mergeable"] and not found["tags"]["needs_data"]
    assert found["targets"] == list(cls.target)
    assert found["alternatives"] == [[each] if isinstance(each, str) else list(each) for each in cls.alternatives]
    assert found["checked"] and found["checked_against"]
    assert found["parameters"] == budgets("lora") and found["parameters"]["Llama 2 7B"] == 4_194_304
    options = {option["name"]: option for option in found["options"]}
    assert options.keys() == cls.Config.model_fields.keys() - {"method"}
    assert options["rank"] == {
        "name": "rank",
        "type": "int",
        "required": False,
        "default": 8,
        "rule": "> 0",
        "description": "Rank of the update.",
    }
    assert (options["scaling"]["type"], options["dropout"]["rule"]) == ("rank | sqrt_rank", "≥ 0.0, < 1.0")


def test_a_method_for_people() -> None:
    text = printed("show", "reparameterized/dora")
    assert "    V = W + s B A,   W' = m V / ||V||,   s = alpha / rank" in text
    assert "https://arxiv.org/abs/2402.09353" in text
    assert "Llama 2 7B" in text
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"checked against +peft 0.21\s", text)
    assert re.search(r"checked against +no other code: equation only\s", printed("show", "peqa"))


def test_a_preset_says_first_what_of_its_paper_it_leaves_out() -> None:
    head = " ".join(printed("show", "s4").split("Union of methods")[0].split())
    assert "a preset: four groups of layers" in head and "not S4 itself" in head
    assert "not S4 itself" in json.loads(printed("show", "s4", "--json"))["note"]
    assert json.loads(printed("show", "rslora", "--json"))["note"] == ""


def test_what_is_compared_stands_beside_its_source() -> None:
    """Outputs alone are not spelled out; code of others has its repository's name."""
    assert "the authors' code (outputs, start, trains)" in " ".join(printed("show", "ssf").split())
    found = json.loads(printed("show", "perfusion", "--json"))
    assert found["compared"] == {"code of lucidrains/perfusion-pytorch": ["outputs"]}
    assert re.search(r"checked against +code of lucidrains/perfusion-pytorch\s", printed("show", "perfusion"))


def test_every_option_of_every_method_has_a_type_and_a_description() -> None:
    for info in peftcore.methods():
        for option in MethodDescription.of(f"{info.plugin}/{info.name}").options:
            assert option.description, (info.name, option.name)
            assert "any" not in option.type.split(), (info.name, option.name)


class Odd(peftcore.author.MethodConfig):
    method: str = "odd"
    sides: tuple[int, float] = (1, 2.0)
    """A ``pair``."""
    several: list[int] | None = Field(None, min_length=2)
    must: bool
    free: Any = None


def test_options_of_every_kind() -> None:
    schemas = Odd.model_json_schema()["properties"]
    found = {name: Option.of(name, field, schemas[name]) for name, field in Odd.model_fields.items()}
    assert {name: (each.type, each.default_text, each.rule) for name, each in found.items() if name in schemas} == {
        "method": ("str", "odd", ""),
        "overrides": ("dict", "{}", ""),
        "sides": ("list[int | float]", "[1,2.0]", "at least 2 of them, at most 2 of them"),
        "several": ("list[int] | none", "null", "at least 2 of them"),
        "must": ("bool", "required", ""),
        "free": ("any", "null", ""),
    }
    assert found["sides"].description == "A pair."


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = options_table([Option("x", "list[int]", False, "[red]", "", "as [bold] as this")])
    table.add_row("peftcore[cli]", "[b]", ":smile:")
    console().print(table)
    out = capsys.readouterr().out
    assert all(each in out for each in ("list[int]", "[red]", "as [bold] as this", "peftcore[cli]", "[b]", ":smile:"))


def test_prose_is_set_anew_and_equations_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(*paragraphs("One\ntwo.\n\n    y = x\n    z = y\n\nThree."), sep="\n")
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "One two.",
        "",
        "    y = x",
        "    z = y",
        "",
        "Three.",
        "",
    ]


@pytest.mark.parametrize("command", ["show", "schema"])
def test_an_unknown_method_is_one_message(command: str) -> None:
    result = CliRunner().invoke(app, [command, "lorra"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no method named 'lorra'; did you mean" in result.stderr


def test_the_schema_of_one_method_and_of_all() -> None:
    assert json.loads(printed("schema", "lora")) == peftcore.method("lora").Config.model_json_schema()
    everything = json.loads(printed("schema"))
    assert {info.name for info in peftcore.methods()} <= everything["$defs"].keys()


class Divided(peftcore.author.Method):
    """Divided.

    Equation:
        y = x

    Start: the identity.

    Differs from the authors' code: nothing
    is known.

    Use it: as a test.
    """

    __module__ = "no_module"
    name = "divided"
    Config = Odd
    tags = peftcore.author.Tags(category="additive", paper="none")
    target = ("attn.q",)

    def inject(self, model: Any, config: Any, surgeon: Any) -> None: ...

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 0


def test_a_description_has_its_sections_as_titles(capsys: pytest.CaptureFixture[str]) -> None:
    shown = MethodDescription(next(iter(peftcore.methods())), Divided)
    assert list(shown.sections) == ["", *HEADINGS]
    console().print(*(line for each in shown.sections.items() for line in section(*each)), sep="\n")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("Equation") + 1] == "    y = x"
    assert lines[lines.index("Differs from the authors' code") + 1] == "nothing is known."
    assert json.loads(printed("show", "lora", "--json"))["sections"] == MethodDescription.of("lora").sections


def test_overrides_say_which_options_they_change() -> None:
    def rule(name: str) -> str:
        return next(each.rule for each in MethodDescription.of(name).options if each.name == "overrides")

    assert (rule("lora"), rule("vqt"), rule("pal")) == ("", "takes none", "of heads, dropout alone")
