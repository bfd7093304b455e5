"""Feed-forward branches and experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from host_zoo import build

from peftcore.roles import derive

torch.set_num_threads(1)


def test_listed_experts_make_one_branch() -> None:
    """Switch keeps its experts as a dictionary of MLPs beside a router."""
    host = derive(build("switch")[0])
    assert [entry.role for entry in host.at("encoder.block.1.layer.1.mlp")] == ["mlp"]
    assert [entry.role for entry in host.at("encoder.block.1.layer.1.mlp.router.classifier")] == ["router"]


@pytest.mark.parametrize("config", ["LlamaConfig", "Qwen2Config", "T5Config"])
def test_square_matrices_are_told_apart_by_their_names(config: str) -> None:
    """Where a feed-forward is as wide as the stream, the shapes of gate, up and down say nothing."""
    sizes: dict[str, Any] = {"vocab_size": 16, "num_hidden_layers": 1}
    if config == "T5Config":
        sizes |= {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    else:
        sizes |= {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    made = getattr(transformers, config)(**sizes)
    cls = transformers.AutoModelForSeq2SeqLM if config == "T5Config" else transformers.AutoModelForCausalLM
    entries = derive(cls.from_config(made)).entries
    found = {entry.module.rpartition(".")[2]: entry.role for entry in entries if entry.role.startswith("mlp.")}
    wanted = {"gate_proj": "mlp.gate", "up_proj": "mlp.up", "down_proj": "mlp.down"}
    assert found == ({"wi_0": "mlp.gate", "wi_1": "mlp.up", "wo": "mlp.down"} if config == "T5Config" else wanted)
