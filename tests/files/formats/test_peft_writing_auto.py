"""Peft opens a folder of ours by itself: it builds the base that the folder names, of the class that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftcore

peft: Any = pytest.importorskip("peft")
transformers: Any = pytest.importorskip("transformers")
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
IDS = torch.arange(1, 9)[None]
KINDS: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any]]] = {
    "writes": ("LlamaForCausalLM", "LlamaConfig", SIZES, "AutoPeftModelForCausalLM", {}),
    "translates": ("T5ForConditionalGeneration", "T5Config", T5, "AutoPeftModelForSeq2SeqLM", {}),
    "embeds": ("BertModel", "BertConfig", SIZES, "AutoPeftModelForFeatureExtraction", {}),
    "classifies": (
        "BertForSequenceClassification",
        "BertConfig",
        {**SIZES, "num_labels": 3},
        "AutoPeftModelForSequenceClassification",
        {"train": ["classifier"]},
    ),
    "tags": (
        "BertForTokenClassification",
        "BertConfig",
        {**SIZES, "num_labels": 3},
        "AutoPeftModelForTokenClassification",
        {"train": ["classifier"]},
    ),
}


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    beside = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    found: torch.Tensor = model.eval()(input_ids=IDS, **beside)[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_the_folder(kind: str, tmp_path: Path) -> None:
    cls, config, sizes, auto, wishes = KINDS[kind]
    torch.manual_seed(0)
    getattr(transformers, cls)(getattr(transformers, config)(**sizes)).save_pretrained(tmp_path / "base")
    model = getattr(transformers, cls).from_pretrained(tmp_path / "base")
    bare = output(model)
    injection = peftcore.apply(model, "lora", rank=2, **wishes)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_()
    injection.save(tmp_path / "adapter", format="peft")
    options = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == str(tmp_path / "base") and "revision" not in options
    # With a task peft's AutoPeftModel refuses, and its models for classes would train a head besides.
    assert options["task_type"] is None and options["auto_mapping"]["base_model_class"] == cls
    expected = output(model)
    assert not torch.allclose(expected, bare)
    for name in (auto, "AutoPeftModel"):
        assert torch.equal(output(getattr(peft, name).from_pretrained(tmp_path / "adapter")), expected)


def test_the_commit_of_the_base_is_there(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.config._name_or_path, model.config._commit_hash = "someone/base", "a" * 40
    peftcore.apply(model, "lora").save(tmp_path, format="peft")
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.revision) == ("someone/base", "a" * 40)
