"""The command `peftcore methods`: the table of what is installed."""

import json

from typer.testing import CliRunner

import peftcore
from peftcore.authoring.budgets import budgets
from peftcore.cli.commands import app


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["methods", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_method_is_listed_with_what_it_declares() -> None:
    rows = {row["name"]: row for row in json.loads(printed("--json"))}
    infos = {info.name: info for info in peftcore.methods(presets=True)}
    assert rows.keys() == infos.keys()
    rows = {name: row for name, row in rows.items() if row["distribution"].startswith("peftcore-")}  # tests have others
    for name, row in rows.items():
        assert "error" not in row
        assert (row["category"], row["mergeable"], row["paper"]) == (
            infos[name].category,
            infos[name].mergeable,
            infos[name].paper,
        )
        assert row["checked"] is bool(row["checked_against"]) is infos[name].checked


def test_one_category_as_a_table() -> None:
    table = printed("--category", "additive")
    assert "additive" in table and "equation" in table and "peft 0.21" in table
    names = {row["name"] for row in json.loads(printed("--category", "additive", "--json"))}
    assert {"lst", "prefix_tuning"} <= names and "lora" not in names


def test_an_unknown_category_names_those_there_are() -> None:
    result = CliRunner().invoke(app, ["methods", "--category", "additives"])
    assert result.exit_code == 2


def test_sizes_are_those_that_the_papers_state() -> None:
    """LoRA at rank 8 on queries and values of 32 layers of width 4096; (IA)^3 on keys, values and 11008 channels."""
    assert budgets("lora")["Llama 2 7B"] == 32 * 2 * 8 * (4096 + 4096)
    assert budgets("ia3")["Llama 2 7B"] == 32 * (4096 + 4096 + 11008)
    assert budgets("bitfit").get("Llama 2 7B") is None  # it has no biases
