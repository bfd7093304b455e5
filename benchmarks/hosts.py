"""Hosts of the shape of Llama, of any size, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 1000


def llama(width: int = 512, layers: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """Build a decoder with four heads of keys and values for eight of queries, and a hidden layer of 2.75 times its
    width."""
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


def mixture(width: int = 256, layers: int = 2, experts: int = 16) -> Any:
    """Build a decoder of the shape of Qwen3-MoE, of whose experts two see each token."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
    )
    made: Any = transformers.Qwen3MoeForCausalLM(config)
    return made.eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    """Draw random tokens [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
