"""Adapters for other programs: what peft reads of the files, and what servers compute, is what the adapter does."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exported_hosts import IDS, as_a_server, llama, logits, noisy
from torch import Tensor, nn

import peftcore
from peftcore.algebra.exporting import export
from peftcore.errors import ExportError, NoWeights
from peftcore.files.readers.check import check
from peftcore.files.readers.reader import reader_named

SERVERS = ("vllm", "sglang", "tgi", "llama.cpp")


def as_peft(folder: Path) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(llama(), str(folder), autocast_adapter_dtype=False).eval())


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("lora", {"vllm": "as it is", "sglang": "as it is", "tgi": "as it is", "llama.cpp": "as it is"}),
        ("rslora", {"vllm": "as it is", "sglang": "as a LoRA", "tgi": "as it is", "llama.cpp": "as a LoRA"}),
        ("vera", dict.fromkeys(SERVERS, "as a LoRA")),
        ("adalora", dict.fromkeys(SERVERS, "as a LoRA")),
        ("lora_xs", dict.fromkeys(SERVERS, "as a LoRA")),
    ],
)
def test_what_is_equal_is_equal_to_peft_and_to_a_server(method: str, how: dict[str, str], tmp_path: Path) -> None:
    model = llama()
    injection = noisy(model, method, **({} if method in ("lora_xs",) else {"rank": 4}))
    ours = logits(model)
    assert not torch.allclose(ours, logits(llama()), rtol=1e-3)
    for name, expected in how.items():
        done = export(injection, tmp_path / name, reader_named(name))
        if method != "lora_xs":
            assert done.how == expected
        assert done.error == 0.0 and done.report.as_trained
        assert close(as_peft(tmp_path / name), ours)
        if name in ("sglang", "llama.cpp"):
            assert close(as_a_server(tmp_path / name), ours)
    assert list(peftcore.injections(model)) == [injection.name] and close(logits(model), ours)


@pytest.mark.parametrize("method", ["dora", "vera", "loha", "ia3", "oft"])
def test_peft_itself_reads_all_its_types_as_they_are(method: str, tmp_path: Path) -> None:
    model = llama()
    done = export(noisy(model, method), tmp_path / "a", reader_named("peft"))
    assert done.how == "as it is" and close(as_peft(tmp_path / "a"), logits(model))


def test_ranks_and_alphas_that_differ_become_one(tmp_path: Path) -> None:
    model = llama()
    injection = noisy(model, "lora", rank=4, alpha=3.0, overrides={"*.v_proj": {"rank": 2, "alpha": 5.0}})
    for name in ("sglang", "tgi"):
        done = export(injection, tmp_path / name, reader_named(name))
        assert done.how == "as a LoRA" and done.rank == 4
        assert close(as_a_server(tmp_path / name), logits(model)) and close(as_peft(tmp_path / name), logits(model))


def test_what_is_no_low_rank_update_is_refused_or_projected_with_its_error(tmp_path: Path) -> None:
    model = llama()
    injection = noisy(model, "dora")
    with pytest.raises(ExportError, match=r"vLLM has no DoRA.*lora_magnitude_vector.*is not low-rank.*--project RANK"):
        export(injection, tmp_path / "a", reader_named("vllm"))
    assert not (tmp_path / "a").exists() and list(peftcore.injections(model)) == [injection.name]
    deltas, ours = peftcore.deltas(injection), logits(model)
    done = export(injection, tmp_path / "a", reader_named("vllm"), rank=3)
    assert done.how == "projected" and done.rank == 3 and 0 < done.error < 1
    for path, delta in deltas.items():
        left = torch.linalg.svdvals(delta)[3:]
        assert done.errors[path] == pytest.approx(float(left.norm() / delta.norm()))
    assert not close(as_peft(tmp_path / "a"), ours) and close(as_peft(tmp_path / "a"), as_a_server(tmp_path / "a"))
    full = export(injection, tmp_path / "b", reader_named("vllm"), rank=16)
    assert full.error < 1e-10 and torch.allclose(as_peft(tmp_path / "b"), ours, rtol=1e-4, atol=1e-6)


def test_with_data_it_is_nearest_in_outputs(tmp_path: Path) -> None:
    model = llama()
    injection = noisy(model, "dora", target=["q_proj"])
    path, seen = "model.layers.0.self_attn.q_proj", []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    logits(model)
    hook.remove()
    x, delta = seen[0].flatten(0, 1), peftcore.deltas(injection)[path]

    def lost(folder: Path) -> float:
        near = peftcore.deltas(peftcore.load(llama(), folder))[path].double()
        return float((x @ (delta - near).T).norm() / (x @ delta.T).norm())

    done = export(injection, tmp_path / "a", reader_named("vllm"), rank=3, data=[{"input_ids": IDS}])
    export(injection, tmp_path / "b", reader_named("vllm"), rank=3)
    assert lost(tmp_path / "a") == pytest.approx(done.errors[path], rel=1e-4) and lost(tmp_path / "a") < lost(
        tmp_path / "b"
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prompt_tuning", {}, "does not change weights.*Instead, serve it with peftcore"),
        ("ln_tuning", {}, "vectors have no low-rank form.*Instead, merge it"),
        ("lora", {"train": ["lm_head"]}, "lm_head.* was trained in addition"),
    ],
)
def test_what_servers_have_nothing_for_is_refused(method: str, options: Any, message: str, tmp_path: Path) -> None:
    injection = noisy(llama(), method, **options)
    for name in SERVERS:
        with pytest.raises(ExportError, match=message):
            export(injection, tmp_path / name, reader_named(name), rank=4)
        assert not list(tmp_path.iterdir())


def test_an_update_of_few_columns_without_factors_is_exact(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Linear(10, 3)).double()
    injection = noisy(model, "attention_only", target=["0"])
    with torch.no_grad():
        value = next(iter(injection.parameters()))
        value.copy_(model[0].weight + torch.randn(10, 2).double() @ torch.randn(2, 12).double())
    done = export(injection, tmp_path / "a", reader_named("llama.cpp"))
    assert done.how == "as a LoRA" and done.rank == 2


def test_an_adapter_that_changes_nothing_yet_is_a_lora_of_rank_one(tmp_path: Path) -> None:
    model = llama()
    done = export(peftcore.apply(model, "ia3"), tmp_path / "a", reader_named("vllm"))
    assert done.how == "as a LoRA" and done.rank == 1 and close(as_peft(tmp_path / "a"), logits(model))


def test_added_rows_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.config._name_or_path = ""
    injection = noisy(model, "lora", target=["q_proj"])
    model.resize_token_embeddings(24)
    with pytest.raises(ExportError):
        export(injection, tmp_path / "a", reader_named("vllm"))


def test_without_weights_only_what_needs_none_is_written(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = llama()
    noisy(llama(), "lora").save(tmp_path / "lora")
    noisy(llama(), "dora").save(tmp_path / "dora")
    assert export(peftcore.load(model, tmp_path / "lora"), tmp_path / "a", reader_named("vllm")).how == "as it is"
    assert check(tmp_path / "a", reader_named("vllm")).as_trained
    with torch.device("meta"):
        model = llama()
    with pytest.raises(NoWeights, match="load the model with its weights"):
        export(peftcore.load(model, tmp_path / "dora"), tmp_path / "b", reader_named("vllm"), rank=4)


@pytest.mark.parametrize(
    ("target", "filled"),
    [
        (["q_proj"], ["v_proj"]),
        (["k_proj", "o_proj"], ["q_proj", "v_proj"]),
        (["v_proj", "up_proj"], ["q_proj", "gate_proj"]),
        (["q_proj", "v_proj", "down_proj"], []),
    ],
)
def test_modules_that_one_program_stacks_are_all_there(target: list[str], filled: list[str], tmp_path: Path) -> None:
    """What was not adapted has an update of zero: what peft and a server compute is what the adapter does."""
    model = llama(num_key_value_heads=1)
    injection = noisy(model, "lora", target=target, rank=3)
    ours = logits(model)
    done = export(injection, tmp_path / "a", reader_named("sglang"))
    assert {path.rpartition(".")[2] for path in done.filled} == set(filled) and len(done.filled) == 2 * len(filled)
    assert done.how == ("as a LoRA" if filled else "as it is") and done.report.as_trained
    assert check(tmp_path / "a", reader_named("sglang")).as_trained
    read = peft.PeftModel.from_pretrained(
        llama(num_key_value_heads=1), str(tmp_path / "a"), autocast_adapter_dtype=False
    )
    assert close(logits(read.eval()), ours) and not close(logits(llama(num_key_value_heads=1)), ours)
    for name, value in read.state_dict().items():
        if "lora_" in name and any(f".{leaf}." in name for leaf in filled):
            assert bool(value.any()) == ("lora_A" in name) and 3 in value.shape
    assert export(injection, tmp_path / "b", reader_named("vllm")).filled == ()
    assert list(peftcore.injections(model)) == [injection.name] and close(logits(model), ours)


def test_a_kind_of_module_is_adapted_in_all_blocks_for_tgi(tmp_path: Path) -> None:
    model = llama()
    injection = noisy(model, "lora", target=["q_proj", "model.layers.1.mlp.up_proj"], rank=2)
    done = export(injection, tmp_path / "a", reader_named("tgi"))
    assert done.filled == ("model.layers.0.mlp.up_proj",) and done.how == "as a LoRA"
    assert close(as_peft(tmp_path / "a"), logits(model)) and close(as_a_server(tmp_path / "a"), logits(model))


def test_what_is_projected_is_filled_too(tmp_path: Path) -> None:
    model = llama()
    injection = noisy(model, "dora", target=["q_proj"])
    done = export(injection, tmp_path / "a", reader_named("sglang"), rank=16)
    assert done.how == "projected" and len(done.filled) == 2 and set(done.errors) == set(peftcore.deltas(injection))
    assert torch.allclose(as_peft(tmp_path / "a"), logits(model), rtol=1e-4, atol=1e-6)


def test_a_model_without_the_other_module_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)})])}).double()
    with pytest.raises(ExportError, match=r"without v_proj.*one of them is missing"):
        export(noisy(model, "lora", target=["q_proj"]), tmp_path / "a", reader_named("sglang"))
    assert not list(tmp_path.iterdir())
