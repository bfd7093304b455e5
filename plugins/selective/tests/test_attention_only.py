"""Attention-only tuning: the kit, which tensors train, and ten steps of them beside training the same in place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_in_place import OPTIMIZERS
from test_in_place import test_ten_steps_end_where_training_in_place_ends as trains_as_in_place
from torch import nn

import peftcore
from peftcore.testing import against, conformance, frozen
from peftcore.testing.hosts import HOSTS

NUMBERS = Path(__file__).parent / "numbers" / "attention_only.json"
CODE: Any = {"repository": "facebookresearch/deit", "commit": "7e160fe", "script": "main.py"}
WEIGHTS = {
    "bert": ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "t5": ["SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"],
    "vit": ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"],
    "encoder": ["self_attn", "self_attn.out_proj"],
}
"""The modules of an attention, by hand."""
MORE = {
    "bert": ("classifier.", "bert.embeddings.position_embeddings."),
    "gpt2": ("transformer.wpe.",),  # its head gives tokens
    "t5": ("SelfAttention.relative_attention_bias.",),
    "vit": ("classifier.", "vit.embeddings.position_embeddings"),
    "encoder": ("head.",),
}
"""What trains along: heads over classes, and tables of positions."""


@conformance("attention_only")
def test_attention_only(check: Callable[[], None]) -> None:
    check()


def tensors(model: nn.Module, host: str) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    within = [name for name in names if name.rpartition(".")[0].endswith(tuple(WEIGHTS[host]))]
    return within + [name for name in names if any(each in name for each in MORE[host])]


@against("authors", "attention_only", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    sites = peftcore.apply(timm.models.VisionTransformer(**sizes), "attention_only").sites
    assert {f"{site.module_path}.{site.tensor}".removeprefix(".") for site in sites} == set(frozen(NUMBERS, "trains"))


@pytest.mark.parametrize("host", ["bert", "gpt2", "t5", "vit", "encoder"])
def test_ten_steps(host: str) -> None:
    trains_as_in_place("attention_only", host, lambda model: tensors(model, host), OPTIMIZERS["adamw"])


@pytest.mark.parametrize(("host", "count"), [("bert", 2), ("gpt2", 2), ("encoder", 2), ("vit", 2)])
def test_number_of_parameters(host: str, count: int) -> None:
    """4 d^2 + 4 d a block."""
    model, _ = HOSTS[host].build()
    alone = {"head": False, "positions": False}
    assert peftcore.plan(model, "attention_only", **alone).trainable == count * (4 * 16**2 + 4 * 16)
    assert peftcore.plan(model, "attention_only", **alone, include_bias=False).trainable == count * 4 * 16**2
    assert peftcore.plan(model, "attention_only", target="attn.*").trainable == count * (4 * 16**2 + 4 * 16)


def test_queries_alone() -> None:
    """Rows of a fused matrix and of its bias; keys and values of it stay."""
    model, inputs = HOSTS["gpt2"].build()
    before: dict[str, Any] = {name: p.detach().clone() for name, p in model.named_parameters()}
    injection = peftcore.apply(model, "attention_only", target="attn.q")
    for operator in injection.operators.values():
        nn.init.normal_(operator.value)
    injection.bake()
    for name, parameter in model.named_parameters():
        changed = (parameter != before[name]).nonzero()
        if name.endswith(("c_attn.weight", "c_attn.bias")):  # Conv1D: outputs last
            assert set(changed[:, -1].tolist()) == set(range(16))
        else:
            assert not len(changed), name
    assert torch.isfinite(model(**inputs).logits).all()


def test_cross_attention_trains_where_it_is_named() -> None:
    model, _ = HOSTS["t5"].build()
    own = peftcore.plan(model, "attention_only")
    both = peftcore.plan(model, "attention_only", target=["attn.*", "cross.*"])
    assert not [site for site in own.sites if "EncDec" in site.path]
    assert len([site for site in both.sites if "EncDec" in site.path]) == 2 * 4
