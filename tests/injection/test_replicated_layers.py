"""Layers that come again: what runs, what is shared, what is refused."""

import copy

import pytest
import torch
import transformers
from torch import nn

import peftcore
from peftcore.errors import UnsupportedHost
from peftcore.injection.replicated_layers import replicated_layers, runs

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
IDS = torch.tensor([[1, 5, 3, 9]])


def llama(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


def test_the_ranges_run_one_behind_the_other() -> None:
    model = llama()
    before = list(model.model.layers)
    peftcore.replicate_layers(model, [[0, 3], [1, 4]])
    layers = model.model.layers
    assert [layer.mlp.up_proj.weight is before[n].mlp.up_proj.weight for layer, n in
            zip(layers, [0, 1, 2, 1, 2, 3], strict=True)] == [True] * 6  # fmt: skip
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(6))
    assert model.config.num_hidden_layers == 6
    expected = llama()
    expected.model.layers = nn.ModuleList(copy.deepcopy(expected.model.layers[n]) for n in [0, 1, 2, 1, 2, 3])
    expected.config.num_hidden_layers = 6
    with torch.no_grad():
        got = model(IDS, use_cache=False).logits
        torch.testing.assert_close(got, expected(IDS, use_cache=False).logits)
        assert not torch.allclose(got, llama()(IDS, use_cache=False).logits, atol=1e-3)
        word = model(IDS, past_key_values=model(IDS[:, :3]).past_key_values).logits  # each place has a cache of its own
    assert word.shape[1] == 4


def test_they_are_recognized_with_skipped_layers_too() -> None:
    model = llama()
    assert replicated_layers(model) == {}
    assert runs(model, [[0, 4]]) and not runs(model, [[0, 3], [1, 4]])
    peftcore.replicate_layers(model, [[0, 2], [1, 2], [3, 4]])
    assert replicated_layers(model) == {"model.layers": [[0, 2], [1, 2], [3, 4]]}
    assert runs(model, [[0, 2], [1, 2], [3, 4]]) and not runs(model, [[0, 2], [0, 2]])
    del model.model.layers.replicated  # made by somebody else: by order alone
    assert replicated_layers(model) == {"model.layers": [[0, 2], [1, 3]]}


def test_adapters_are_apart_where_weights_are_shared() -> None:
    model = llama()
    peftcore.replicate_layers(model, [[0, 2], [1, 4]])
    injection = peftcore.apply(model, "lora", target=["q_proj"], rank=2)
    assert len(injection.operators) == 5
    with torch.no_grad():
        plain = model(IDS).logits
        injection.operators["model.layers.2.self_attn.q_proj"].B.normal_()
        assert (model(IDS).logits - plain).abs().max() > 1e-3
        injection.operators["model.layers.2.self_attn.q_proj"].B.zero_()
        torch.testing.assert_close(model(IDS).logits, plain)


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedHost, match=r"no layers \[\[0, 9\]\]"):
        peftcore.replicate_layers(llama(), [[0, 9]])
    with pytest.raises(UnsupportedHost, match="0 lists of layers"):
        peftcore.replicate_layers(nn.Linear(2, 2), [[0, 1]])
    two = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)]), "b": nn.ModuleList([nn.Linear(2, 2)])})
    with pytest.raises(UnsupportedHost, match=r"2 lists of layers: pass path=, one of \['a', 'b'\]"):
        peftcore.replicate_layers(two, [[0, 1], [0, 1]])
    peftcore.replicate_layers(two, [[0, 1], [0, 1]], path="b")
    assert len(two["b"]) == 2
    model = llama()
    peftcore.apply(model, "lora")
    with pytest.raises(UnsupportedHost, match="without adapters"):
        peftcore.replicate_layers(model, [[0, 2], [0, 2]])
