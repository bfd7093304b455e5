"""Trainable tokens in folders of peft of their own, both ways. (Beside a LoRA: tests/files/formats/test_peft.py.)"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_folders import assert_reads, assert_writes, saved_by_peft
from safetensors.torch import load_file, save_file

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TOKENS = [7, 3, 5, 1]


def host(name: str) -> tuple[Any, Any]:
    model, inputs = HOSTS[name].build()
    inputs["input_ids"][:, :3] = torch.tensor([3, 5, 7])
    return model, lambda adapted: adapted(**inputs).logits


@pytest.mark.parametrize(("name", "table"), [("llama", "embed_tokens"), ("gpt2", "wte"), ("bert", "word_embeddings")])
def test_both_ways(name: str, table: str, tmp_path: Path) -> None:
    """A table of its own, one that is tied to the head, one below others; peft keeps the order, ours ascends."""
    base, run = host(name)
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=[table])
    injection = assert_reads(base, config, run, tmp_path)
    assert [operator.index.tolist() for operator in injection.operators.values()] == [sorted(TOKENS)]
    written = assert_writes(base, "trainable_tokens", {"token_indices": TOKENS}, run, tmp_path)
    assert (written["token_indices"], written["target_modules"]) == (sorted(TOKENS), [table])


def test_rows_of_tied_tables_that_differ_are_refused(tmp_path: Path) -> None:
    """Peft writes those of each table; they are the same there."""
    base, _ = host("gpt2")
    saved_by_peft(base, peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["wte"]), tmp_path)
    file, name = tmp_path / "adapter_model.safetensors", "base_model.model.lm_head.trainable_tokens_delta"
    tensors = load_file(file)
    tensors[name][0] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="unknown tensors for lm_head"):
        peftcore.load(base, tmp_path)


def test_a_head_of_its_own(tmp_path: Path) -> None:
    base, run = host("llama")
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["lm_head"])
    assert list(assert_reads(base, config, run, tmp_path).operators) == ["lm_head"]
    assert_writes(base, "trainable_tokens", {"token_indices": TOKENS, "target": "lm_head"}, run, tmp_path)


def test_refusals(tmp_path: Path) -> None:
    base, _ = host("gpt2")
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["lm_head"])
    saved_by_peft(base, config, tmp_path / "head")
    with pytest.raises(CheckpointError, match="lm_head is tied to a table in which peft does not train these tokens"):
        peftcore.load(base, tmp_path / "head")
    base, _ = host("llama")
    saved_by_peft(base, peft.TrainableTokensConfig(token_indices=TOKENS), tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    options = json.loads(file.read_text())
    for tokens, match in (
        ([1, 2], r"shape \(4, 16\), expected \(2, 16\)"),
        (["a"], "a list of token ids"),
        (3, "is 3"),
    ):
        file.write_text(json.dumps({**options, "token_indices": tokens}))
        with pytest.raises(CheckpointError, match=match):
            peftcore.load(base, tmp_path / "theirs")
    parts = [{"method": "trainable_tokens", "token_indices": [1], "target": path} for path in ("lm_head", "embed")]
    with pytest.raises(ExportError, match="several parts of the types TRAINABLE_TOKENS in one file"):
        peftcore.apply(base, parts).save(tmp_path / "two", format="peft")
