"""Invertible adapters: numbers of the adapters package, alone and with those in the layers; where they stand, and what
has no embeddings of tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from adapters_package import IDS, SIZES, wave, waves
from torch import Tensor, nn

import peftcore
from peftcore.errors import TargetError, UnsupportedSite
from peftcore.testing import against, conformance, frozen
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "madx_invertible.json"
PLACES = {
    "llama": {"model.embed_tokens": ["lm_head"]},
    "moe": {"model.embed_tokens": ["lm_head"]},
    "gpt2": {"transformer.wte": ["lm_head"]},
    "t5": {"encoder.embed_tokens": ["lm_head"]},
    "bert": {"bert.embeddings.word_embeddings": ["bert.embeddings"]},
}
"""Tables, and further places: what makes embeddings around a table, and matrices that predict tokens, by hand."""


@conformance("madx_invertible")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@torch.no_grad()
def host(name: str) -> nn.Module:
    """The numbers of the frozen script: a base, a head behind it whose last matrix may be the table."""
    if name == "bert":
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **without)).double().train()
        waves(model.bert.parameters(), 0.1)
        head = model.cls.predictions
        waves([*head.transform.dense.parameters(), *head.transform.LayerNorm.parameters(), head.decoder.bias], 0.7)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).double().train()
        waves(model.model.parameters(), 0.1)
        model.lm_head.weight.copy_(wave(model.lm_head.weight, 0.9))
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["madx_invertible", "madx"])
@against(
    "adapters 1.3",
    "madx_invertible",
    repository="adapter-hub/adapters",
    commit="88f18eb",
    script="src/adapters/methods/modeling.py",
)
def test_the_numbers_of_the_adapters_package(kind: str, name: str) -> None:
    numbers, model = frozen(NUMBERS)[kind][name], host(name)
    parts = ["madx_invertible", {"method": "pfeiffer_adapter", "bottleneck": 4}]
    injection = peftcore.apply(model, "madx_invertible" if kind == "madx_invertible" else parts, dtype="float64")
    tensors = [p for operator in injection.operators.values() for p in operator.parameters()]
    waves(tensors, 0.2)
    y = model(input_ids=IDS).logits
    assert (y - host(name)(input_ids=IDS).logits).abs().max() > 0.01
    (y.square() * wave(y, 0.3)).sum().backward()
    assert y.flatten().tolist() == pytest.approx(numbers["output"], abs=1e-7)
    assert len(tensors) == len(numbers["gradients"])
    for tensor, (key, gradient) in zip(tensors, numbers["gradients"].items(), strict=True):
        assert tensor.grad is not None and tensor.grad.any()
        assert tensor.grad.flatten().tolist() == pytest.approx(gradient, abs=1e-6), key


@pytest.mark.parametrize("name", PLACES)
def test_places(name: str) -> None:
    """And 4 (d / 2)^2 / r + ... parameters, once: 16 is the width, 8 half of it."""
    model, _ = HOSTS[name].build()
    injection = peftcore.apply(model, "madx_invertible")
    found = {graft.site.path: [each.module_path for each in graft.holders[1:]] for graft in injection.grafts}
    assert found == PLACES[name]
    assert sum(p.numel() for p in injection.parameters()) == 2 * (2 * 8 * 4 + 4 + 8)
    assert peftcore.plan(HOSTS[name].build()[0], "madx_invertible").trainable == 2 * (2 * 8 * 4 + 4 + 8)


def test_the_head_undoes_what_the_embeddings_got() -> None:
    """Where nothing lies between: a model whose layers pass on what they read."""
    model, inputs = HOSTS["llama"].build()
    model = model.double().eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.norm = nn.Identity()
    before, embedded = model(**inputs).logits, model.model.embed_tokens(inputs["input_ids"])
    injection = peftcore.apply(model, "madx_invertible", dtype="float64")
    fill(injection)
    assert (model.model.embed_tokens(inputs["input_ids"]) - embedded).abs().max() > 1e-3
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-12, atol=1e-12)


def test_halves_of_an_odd_width() -> None:
    sizes = {"vocab_size": 11, "hidden_size": 9, "intermediate_size": 12, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=3, max_position_embeddings=16)
    model = transformers.BertForMaskedLM(config).eval()
    injection = peftcore.apply(model, "madx_invertible", reduction=3, init_std=0.3)
    (operator,) = injection.operators.values()
    shapes = [tuple(part.weight.shape) for net in (operator.F, operator.G) for part in (net.down, net.up)]
    assert shapes == [(1, 5), (4, 1), (1, 4), (5, 1)]
    assert sum(p.numel() for p in injection.parameters()) == (5 + 1 + 4 + 4) + (4 + 1 + 5 + 5)
    x: Tensor = model(input_ids=IDS).logits
    assert x.isfinite().all()


def test_what_embeds_no_tokens() -> None:
    with pytest.raises(TargetError, match="embed"):
        peftcore.apply(HOSTS["vit"].build()[0], "madx_invertible")
    with pytest.raises(UnsupportedSite, match="stack of tokens"):
        peftcore.apply(HOSTS["dit"].build()[0], "madx_invertible")
