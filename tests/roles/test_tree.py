"""The host map as text."""

from __future__ import annotations

import torch
from torch import nn
from zoo_maps import host_of

from peftcore.roles import derive

torch.set_num_threads(1)


def test_tree_folds_what_repeats() -> None:
    text = host_of("gpt_neox").tree()
    assert text.splitlines() == [
        "gpt_neox                      stack",
        "  embed_in                    embed       99 x 48",
        "  layers.[0-1]                block",
        "    input_layernorm           norm        48",
        "    post_attention_layernorm  norm        48",
        "    attention                 attn",
        "      query_key_value         attn.qkv    144 x 48  4 x [q 12 | k 12 | v 12]",
        "      dense                   attn.out    48 x 48",
        "    mlp                       mlp",
        "      dense_h_to_4h           mlp.up      80 x 48",
        "      dense_4h_to_h           mlp.down    48 x 80",
        "  final_layer_norm            norm.final  48",
        "lm_head                       head        99 x 48",
    ]


def test_tree_tells_runs_towers_streams_and_what_is_read() -> None:
    jamba = host_of("jamba").tree()
    assert "[0,2]" in jamba and "[1,3]" in jamba
    assert any("experts" in line and "read, not called" in line for line in jamba.splitlines())
    towers = [line for line in host_of("clip").tree().splitlines() if "tower" in line]
    assert [line.split()[:3] for line in towers] == [
        ["text_model", "text", "tower"],
        ["vision_model", "vision", "tower"],
    ]
    assert "context stream" in host_of("flux").tree()
    assert "block + attn" in host_of("unet2d").tree()


def test_tree_does_not_grow_with_depth() -> None:
    lines = {len(derive(deep(layers)).tree().splitlines()) for layers in (2, 40)}
    assert len(lines) == 1


def deep(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with torch.device("meta"):
        return nn.TransformerEncoder(layer, layers)
