"""What programs read of files, by their rules: what is changed, dropped or refused is said with the tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_hosts import as_a_server, llama, logits, noisy
from safetensors.torch import load_file, save_file

from peftcore.errors import CheckpointError
from peftcore.files.readers.check import ReaderReport, check
from peftcore.files.readers.reader import Verdict, reader_named, readers

LANGUAGE = ("vllm", "sglang", "tgi", "llama.cpp")


def folder_of(path: Path, method: str = "lora", **options: Any) -> Path:
    noisy(llama(), method, **options).save(path, format="peft")
    return path


def said(report: ReaderReport) -> dict[str, str]:
    return {row.what.rpartition("self_attn.")[2]: row.verdict.value for row in report.rows if row.verdict != "read"}


@pytest.mark.parametrize("name", ["peft", *LANGUAGE])
def test_plain_lora_is_read_by_all(name: str, tmp_path: Path) -> None:
    report = check(folder_of(tmp_path / "a", rank=4, alpha=3.0), reader_named(name))
    assert report.as_trained and not report.reasons and not report.needs
    held = {tensor for row in report.rows for tensor in row.tensors}
    assert held == set(load_file(tmp_path / "a/adapter_model.safetensors"))


def test_the_scale_of_rslora_is_read_by_some_and_changed_by_others(tmp_path: Path) -> None:
    model = llama()
    injection = noisy(model, "rslora", rank=4)
    injection.save(tmp_path / "a", format="peft")
    found = {name: said(check(tmp_path / "a", reader_named(name))) for name in LANGUAGE}
    changed = {"option use_rslora": "changed"}
    assert found == {"vllm": {}, "sglang": changed, "tgi": {}, "llama.cpp": changed}
    assert not torch.allclose(as_a_server(tmp_path / "a"), logits(model), rtol=1e-3)


def test_dora_is_refused_or_changed_with_the_magnitudes_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", "dora")
    magnitudes = [f"{name}_proj.lora_magnitude_vector" for name in "qv"]
    of_option = {"vllm": "refused", "sglang": "refused", "tgi": "changed", "llama.cpp": "refused"}
    of_tensor = {"vllm": "refused", "sglang": "refused", "tgi": "dropped", "llama.cpp": "refused"}
    expected = {
        name: {"option use_dora": of_option[name], **dict.fromkeys(magnitudes, of_tensor[name])} for name in LANGUAGE
    }
    assert {name: said(check(folder, reader_named(name))) for name in LANGUAGE} == expected
    assert check(folder, reader_named("peft")).as_trained


def test_a_head_that_trained_along(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", train=["lm_head"])
    verdicts = {name: check(folder, reader_named(name)).verdict.value for name in LANGUAGE}
    assert verdicts == {"vllm": "refused", "sglang": "dropped", "tgi": "dropped", "llama.cpp": "refused"}


def test_ranks_and_alphas_that_differ(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", rank=4, overrides={"*.v_proj": {"rank": 20, "alpha": 5.0}})
    found = {name: said(check(folder, reader_named(name))) for name in LANGUAGE}
    assert found["vllm"] == {} and check(folder, reader_named("vllm")).needs == "--max-lora-rank 32"
    assert found["llama.cpp"] == {"option alpha_pattern": "changed"}
    refused = {"option alpha_pattern": "changed", "option rank_pattern": "refused"}
    assert found["sglang"] == found["tgi"] == refused


def test_what_vllm_reads_from_some_version_on_says_so(tmp_path: Path) -> None:
    """Its sources of 0.31.0 know neither option."""
    folder = folder_of(tmp_path / "a", rank=4, overrides={"*.0.self_attn.q_proj": {"rank": 8, "alpha": 3.0}})
    report = check(folder, reader_named("vllm"))
    told = {row.what: row.why for row in report.rows if row.why}
    assert report.as_trained and not report.reasons and told.keys() == {"option rank_pattern", "option alpha_pattern"}
    assert all(why.startswith("from vLLM 0.32.0 on; 0.31.0 and earlier pass over it") for why in told.values())


def test_a_rank_above_the_largest_is_refused(tmp_path: Path) -> None:
    report = check(folder_of(tmp_path / "a", rank=600), reader_named("vllm"))
    assert report.verdict is Verdict.REFUSED and "reads at most 512" in report.reasons[0]
    assert check(tmp_path / "a", reader_named("llama.cpp")).as_trained


def test_another_type_is_refused_as_a_whole(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", "vera")
    for name in LANGUAGE:
        [row] = check(folder, reader_named(name)).rows
        assert row.what == "peft_type VERA" and row.verdict is Verdict.REFUSED
        assert set(row.tensors) == set(load_file(folder / "adapter_model.safetensors"))


def test_a_type_that_a_program_takes_for_lora(tmp_path: Path) -> None:
    """TGI's own code loaded it, and computed something else (docs/generate/readers_in_programs.py)."""
    folder = folder_of(tmp_path / "a", "adalora")
    verdicts = {name: check(folder, reader_named(name)).verdict.value for name in LANGUAGE}
    assert verdicts == {"vllm": "refused", "sglang": "refused", "tgi": "changed", "llama.cpp": "refused"}


def test_magnitudes_of_outputs_and_of_inputs_in_kohyas_names(tmp_path: Path) -> None:
    """ComfyUI's own code computed something else of the former (docs/generate/readers_in_programs.py)."""
    noisy(llama(), "dora").save(tmp_path / "a", format="kohya")
    report = check(tmp_path / "a", reader_named("comfyui"))
    assert report.verdict is Verdict.CHANGED and {row.verdict for row in report.rows} == {"read", "changed"}
    [file] = (tmp_path / "a").glob("*.safetensors")
    tensors = load_file(file)
    turned = {name: value.flatten()[None] if name.endswith("dora_scale") else value for name, value in tensors.items()}
    save_file(turned, file)
    assert check(tmp_path / "a", reader_named("comfyui")).as_trained


def test_an_option_that_nobody_knows_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_next_idea": True, "another": None}))
    for name in ("peft", *LANGUAGE):
        assert said(check(folder, reader_named(name))) == {"option use_next_idea": "changed"}


def test_a_start_that_changes_the_base(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    verdicts = {}
    for start in (True, "gaussian", "pissa"):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
        verdicts[start] = [check(folder, reader_named(name)).verdict.value for name in ("peft", "vllm", "llama.cpp")]
    assert verdicts == {True: ["read"] * 3, "gaussian": ["read"] * 3, "pissa": ["read", "refused", "changed"]}


def test_tables_and_parameters_that_servers_look_for_by_other_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    table = "base_model.model.model.embed_tokens.base_layer.weight"
    inner = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.lora_A.weight"
    beside = {table: torch.zeros(20, 16), inner: torch.zeros(4, 16)}
    save_file({**tensors, **beside}, folder / "adapter_model.safetensors")
    for name, expected in {"vllm": ("dropped", "dropped"), "llama.cpp": ("dropped", "refused")}.items():
        rows = {row.what: row.verdict.value for row in check(folder, reader_named(name)).rows}
        assert (rows[table], rows[inner]) == expected


def test_convolutions_are_for_programs_that_paint(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2)).double()
    noisy(model, "lora", target=["0", "2"], rank=2).save(tmp_path / "a", format="peft")
    assert check(tmp_path / "a", reader_named("peft")).as_trained
    assert check(tmp_path / "a", reader_named("vllm")).verdict is Verdict.REFUSED


def test_files_of_another_format_are_refused_with_the_way_out(tmp_path: Path) -> None:
    noisy(llama(), "lora").save(tmp_path / "a")
    for name, reader in readers().items():
        [row] = check(tmp_path / "a", reader).rows
        assert row.verdict is Verdict.REFUSED and "peftcore export writes one" in row.why, name


def test_kohyas_names_of_dora_lose_their_magnitudes_in_diffusers(tmp_path: Path) -> None:
    noisy(llama(), "dora").save(tmp_path / "a", format="kohya")
    report = check(tmp_path / "a", reader_named("diffusers"))
    assert report.verdict is Verdict.DROPPED
    noisy(llama(), "loha").save(tmp_path / "b", format="kohya")
    assert check(tmp_path / "b", reader_named("diffusers")).verdict is Verdict.REFUSED
    assert check(tmp_path / "b", reader_named("comfyui")).as_trained


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        check(tmp_path / "none", reader_named("vllm"))


def test_modules_that_are_read_only_beside_others(tmp_path: Path) -> None:
    rows = {}
    for index, target in enumerate((["q_proj"], ["k_proj", "v_proj"], ["q_proj", "v_proj"], ["up_proj"])):
        folder = folder_of(tmp_path / str(index), target=target)
        rows[" ".join(target)] = {each.verdict.value for each in check(folder, reader_named("sglang")).rows}
        assert check(folder, reader_named("vllm")).as_trained
    lost = {"read", "dropped"}
    assert rows == {
        "q_proj": {"read", "refused"}, "k_proj v_proj": lost, "q_proj v_proj": {"read"}, "up_proj": lost,
    }  # fmt: skip
    [reason] = check(tmp_path / "0", reader_named("sglang")).reasons
    assert reason.endswith("one of them is missing; peftcore export adapts v_proj too, by an update of zero")


def test_modules_that_are_adapted_in_some_blocks_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", target=["model.layers.*.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    report = check(folder, reader_named("tgi"))
    assert {row.what.rpartition(".")[2] for row in report.rows if row.verdict is Verdict.DROPPED} == {"up_proj"}
    assert check(folder, reader_named("vllm")).as_trained
