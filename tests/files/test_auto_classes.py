"""A model's class is looked up in what transformers' Auto classes list."""

from typing import Any

import pytest
import torch
from torch import nn

from peftcore.files.auto_classes import AUTO_CLASSES, TASKS, auto_classes, task_of

transformers: Any = pytest.importorskip("transformers")
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
T5 = {"d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 8}


@pytest.mark.parametrize(
    ("cls", "config", "sizes", "task"),
    [
        ("LlamaForCausalLM", "LlamaConfig", SMALL, "text-generation"),
        ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 8, "n_layer": 1, "n_head": 1}, "text-generation"),
        ("BertForSequenceClassification", "BertConfig", SMALL, "text-classification"),
        ("BertForTokenClassification", "BertConfig", SMALL, "token-classification"),
        ("BertForMaskedLM", "BertConfig", SMALL, "fill-mask"),
        ("BertModel", "BertConfig", SMALL, ""),
        ("ViTForImageClassification", "ViTConfig", SMALL, "image-classification"),
        ("T5ForConditionalGeneration", "T5Config", T5, ""),
    ],
)
def test_the_task_of_a_class(cls: str, config: str, sizes: dict[str, int], task: str) -> None:
    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
    assert task_of(model) == task
    autos = list(auto_classes(model.config, cls))
    assert autos and set(autos) <= AUTO_CLASSES.keys()
    assert type(getattr(transformers, autos[0]).from_config(model.config)) is type(model)


def test_what_is_not_listed() -> None:
    config = transformers.BertConfig(**SMALL)
    assert not list(auto_classes(config, "LlamaForCausalLM")) and not list(auto_classes(config, "system"))
    assert task_of(nn.Linear(2, 2)) == ""


def test_tasks_of_peft_are_in_the_list() -> None:
    assert set(TASKS.values()) <= AUTO_CLASSES.keys()
