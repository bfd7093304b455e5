"""Hosts of the shape of Llama, of any size, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 1000


def llama(width: int = 512, layers: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """A decoder with four heads of keys and values for eight of queries, and a hidden layer of 2.75 times its width."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    made: Any = transformers.LlamaForCausalLM(config)
    return made.to(dtype).eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    """Random tokens [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
