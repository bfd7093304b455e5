"""Attention is found wherever it is, and each of its matrices is told."""

from __future__ import annotations

import pytest
import torch
from host_zoo import EXTRA, build
from torch import nn

from peftcore.roles import derive

torch.set_num_threads(1)


def test_bare_query_key_value_parameters() -> None:
    """XLNet has no Linear in its attention."""
    host = derive(build("xlnet")[0])
    layer = "transformer.layer.0.rel_attn"
    assert {name: [e.role for e in host.at(f"{layer}.{name}")] for name in "qkvo"} == {
        "q": ["attn.q"],
        "k": ["attn.k"],
        "v": ["attn.v"],
        "o": ["attn.out"],
    }
    (query,) = host.at(f"{layer}.q")
    assert (query.module, query.tensor, query.called, query.shape) == (layer, "q", False, (48, 48))


@pytest.mark.parametrize("name", EXTRA)
def test_attention_is_found_beyond_the_survey(name: str) -> None:
    host = derive(build(name)[0])
    blocks = {entry.path for entry in host.entries if entry.role == "block"}
    attending = {entry.block for entry in host.entries if entry.role.startswith("attn.")}
    convolutional = {entry.block for entry in host.entries if entry.role == "conv"}
    assert blocks and blocks - convolutional <= attending


def test_torch_transformer() -> None:
    """Plain torch: the attention reads its matrices, the second attention of a decoder layer is cross attention."""
    host = derive(nn.Transformer(8, 2, 1, 2, 16, batch_first=True))
    layer = "decoder.layers.1"
    roles = {entry.path.removeprefix(layer): entry.role for entry in host.entries if entry.path.startswith(layer)}
    assert roles[".self_attn"] == "attn"
    assert roles[".multihead_attn"] == "cross"
    assert roles[".multihead_attn.in_proj_weight"] == "cross.qkv"
    assert (roles[".linear1"], roles[".linear2"]) == ("mlp.up", "mlp.down")
    (out,) = host.at(f"{layer}.self_attn.out_proj")
    assert (out.module, out.tensor, out.called) == (f"{layer}.self_attn", "out_proj.weight", False)
