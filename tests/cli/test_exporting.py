"""`peftcore check` and `export`: exit codes, what is said and written, and that a refusal writes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_hosts import as_a_server, llama, logits, noisy
from typer.testing import CliRunner

from peftcore.cli.commands import app
from peftcore.files.readers.reader import readers


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output and not result.stdout, result.output
    return " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("base")


def test_check_says_what_is_read_by_its_exit_code_and_in_words() -> None:
    noisy(llama(), "rslora", rank=20).save("a", format="peft")
    found = run("check", "a", "--for", "vllm", "--json")
    data = json.loads(found.stdout)
    assert found.exit_code == 0 and data["as_trained"] and data["needs"] == "--max-lora-rank 32"
    assert data["rules"]["source"].startswith("vllm-project/vllm@") and data["rules"]["files"] and data["notes"]
    changed = run("check", "a", "--for", "llama.cpp")
    assert changed.exit_code == 1 and "option use_rslora" in changed.stdout and "changed" in changed.stdout
    assert "no rules for the program 'ollama'" in refused("check", "a", "--for", "ollama")
    assert "does not exist" in refused("check", "none", "--for", "vllm")


@pytest.mark.parametrize("name", ["peft", "vllm", "sglang", "tgi", "llama.cpp", "mlx-lm"])
def test_export_writes_what_check_finds_to_be_read(name: str) -> None:
    noisy(llama(), "vera").save("a")
    found = run("export", "a", "out", "--for", name, "--model", "base", "--json")
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert data["how"] == ("as it is" if name == "peft" else "as a LoRA") and data["largest_error"] == 0
    assert run("check", "out", "--for", name).exit_code == 0
    assert set(data["files"]) == {f"out/{path.name}" for path in Path("out").iterdir()}


def test_export_says_which_modules_it_adapts_beside_the_others() -> None:
    noisy(llama(), "lora", target=["q_proj"]).save("a", format="peft")
    checked = run("check", "a", "--for", "sglang")
    assert checked.exit_code == 1 and "peftcore export adapts v_proj too" in " ".join(checked.stdout.split())
    command = ("export", "a", "out", "--for", "sglang", "--model", "base")
    data = json.loads(run(*command, "--json").stdout)
    assert data["filled"] == [f"model.layers.{block}.self_attn.v_proj" for block in (0, 1)]
    shown = " ".join(run(*command, "--overwrite").stdout.split())
    assert "self_attn.v_proj, by an update of zero" in shown and run("check", "out", "--for", "sglang").exit_code == 0


def test_what_needs_a_projection_is_refused_until_there_is_one() -> None:
    model = llama()
    noisy(model, "dora").save("a")
    ours = logits(model)
    assert "--project RANK" in refused("export", "a", "out", "--for", "vllm", "--model", "base")
    bound = ("export", "a", "out", "--for", "vllm", "--model", "base", "--project", 3, "--max-error", 0.01)
    assert "A higher --project loses less" in refused(*bound) and not Path("out").exists()
    found = run(*bound[:-2])
    assert found.exit_code == 0 and "the nearest LoRA of rank 3" in " ".join(found.stdout.split())
    near = as_a_server(Path("out"))
    assert not torch.allclose(near, ours, rtol=1e-3)
    assert (near - ours).norm() < (logits(llama()) - ours).norm()


@pytest.mark.slow
def test_data_wants_a_projection_texts_and_a_tokenizer() -> None:
    noisy(llama(), "dora").save("a")
    command = ("export", "a", "out", "--for", "vllm", "--model", "base")
    assert "pass --project RANK" in refused(*command, "--data", "texts.txt")
    assert "cannot be read" in refused(*command, "--project", 3, "--data", "texts.txt")
    Path("texts.txt").write_text("\n\n")
    assert "no lines of text" in refused(*command, "--project", 3, "--data", "texts.txt")
    Path("texts.txt").write_text("1 2 3\n4 5\n")
    assert "needs a tokenizer" in refused(*command, "--project", 3, "--data", "texts.txt")
    _tokenizer(Path("base"))
    one, other = ({}, {})
    for found, data in ((one, ()), (other, ("--data", "texts.txt"))):
        result = run(*command, "--project", 3, *data, "--json", "--overwrite")
        assert result.exit_code == 0, result.output
        found.update(json.loads(result.stdout)["errors"])
    assert one.keys() == other.keys() and one != other and max(other.values()) < max(one.values())


def test_the_base_may_be_named_by_the_file_and_a_part_of_a_pipeline_is_refused() -> None:
    noisy(llama(), "lora").save("a", format="peft")
    assert "pass --model" in refused("export", "a", "out", "--for", "vllm")
    model = llama()
    model.config._name_or_path = "base"
    noisy(model, "lora").save("b", format="peft")
    assert run("export", "b", "out", "--for", "vllm").exit_code == 0
    assert "remove --component" in refused("export", "b", "o", "--for", "vllm", "--component", "unet")


def test_the_readers_in_the_help_are_those_with_rules() -> None:
    shown = " ".join(run("export", "--help").stdout.split())
    assert all(name in shown for name in readers())


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(number): number for number in range(20)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
