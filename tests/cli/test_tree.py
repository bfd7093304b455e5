"""`peftcore tree`: the host folded, and what methods would change in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from looking import folder_of
from rich.console import Console
from typer.testing import CliRunner

from peftcore.cli.commands import app
from peftcore.cli.inspection.host_tree import shown
from peftcore.injection.request import host_map
from peftcore.models.dry_run import RequestedMethod
from peftcore.models.skeletons import skeleton


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("gpt2", tmp_path_factory.mktemp("models"))


def lines(*arguments: object) -> list[str]:
    result = CliRunner().invoke(app, ["tree", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return [line.rstrip() for line in result.stdout.splitlines()]


def as_json(*arguments: object) -> dict[str, Any]:
    return json.loads("\n".join(lines(*arguments, "--json")))


def test_a_host_without_methods(gpt2: Path) -> None:
    found = lines(gpt2)
    assert found[:2] == ["GPT2LMHeadModel (transformers, float32)", str(gpt2)]
    assert "    attn      attn" in found
    assert "      c_attn  attn.qkv    48×16    [q 16 | k 16 | v 16]" in found
    assert sum(line.lstrip().startswith("h.") for line in found) == 1  # both layers are one line


def test_what_methods_change_stands_at_its_place(gpt2: Path) -> None:
    found = lines(gpt2, "lora", "bitfit", "--exclude", "*.mlp.*")
    at = next(index for index, line in enumerate(found) if line.startswith("      c_attn"))
    assert [line.strip() for line in found[at + 1 : at + 3]] == [
        "lora [attn.q] A 8×16, B 16×8",
        "lora [attn.v] A 8×16, B 16×8",
    ]
    assert found[at + 3].split() == ["bias", "bitfit", "value", "48"]
    assert "lora: trainable 1,024 of" in found[-2] and found[-1].startswith("bitfit: trainable ")
    assert not any("bitfit value 64" in line for line in found)


def test_layers_that_change_differently_are_not_one_line(gpt2: Path) -> None:
    found = lines(gpt2, "adapterdrop", "--option", "drop_first_layers=1")
    assert sum("adapterdrop down.weight" in line for line in found) == 1
    assert {"    0", "    1"} <= {line[:5] for line in found}


def test_changes_are_in_colour(gpt2: Path) -> None:
    console = Console(force_terminal=True, width=100, color_system="standard", markup=False)
    with console.capture() as captured:
        console.print(shown(str(gpt2), [RequestedMethod("lora", {}), RequestedMethod("ia3", {})]).page())
    found = captured.get().splitlines()
    green, magenta = "\x1b[32m", "\x1b[35m"
    assert any(green in line and "lora [attn.q]" in line for line in found)
    assert any(magenta in line and "ia3 [attn.k]" in line for line in found)
    assert any(line.lstrip().startswith(green) and "c_attn" in line for line in found)
    assert not any(green in line or magenta in line for line in found if "c_fc" in line)


def test_as_json(gpt2: Path) -> None:
    found = as_json(gpt2, "lora", "--option", "rank=2")
    entries = host_map(skeleton(str(gpt2)).model).entries
    assert [(each["path"], each["role"]) for each in found["entries"]] == [(e.path, e.role) for e in entries]
    fused = next(each for each in found["entries"] if each["path"] == "transformer.h.0.attn.c_attn")
    assert fused["layout"] == {"q": [[0, 16]], "k": [[16, 32]], "v": [[32, 48]]}
    [lora] = found["methods"]
    assert (lora["method"], lora["options"]) == ("lora", {"rank": 2})
    assert lora["sites"][0] == {
        "path": "transformer.h.0.attn.c_attn:attn.q",
        "role": "attn.q",
        "weight": [16, 16],
        "tensors": {"A": [2, 16], "B": [16, 2]},
        "trainable": 64,
    }


def test_a_method_that_has_no_place_here(gpt2: Path) -> None:
    result = CliRunner().invoke(app, ["tree", str(gpt2), "ip_adapter"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "matches nothing" in result.stderr
