"""Small models whose tables of tokens are tied, or not."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
    "bart": {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    },
}  # fmt: skip
CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
}
TARGETS = {"llama": "q_proj", "gpt2": "c_attn", "bart": "q_proj"}
"""What a LoRA adapts beside the tables."""
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bart": "embed_tokens"}
"""The last name of embeddings."""
HEAD = "lm_head"
IDS = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(1))


def tables(name: str) -> dict[str, list[str]]:
    """The lists of names that a recipe may have."""
    return {"embedding": [EMBEDDINGS[name]], "head": [HEAD], "both": [EMBEDDINGS[name], HEAD]}


def host(name: str, tied: bool) -> nn.Module:
    """The same model each time, in float64."""
    config, kind = CLASSES[name]
    torch.manual_seed(0)
    model: nn.Module = kind(config(vocab_size=40, tie_word_embeddings=tied, **SIZES[name]))
    return model.double().eval()


def run(model: Callable[..., Any]) -> Tensor:
    """The logits."""
    logits: Tensor = model(input_ids=IDS).logits
    return logits


def shift(parameters: Sequence[nn.Parameter], seed: int = 3) -> None:
    """Move parameters by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in parameters:
            each.add_(0.1 * torch.randn(each.shape, generator=generator, dtype=each.dtype))


def loss(model: Callable[..., Any]) -> Tensor:
    """A loss in which each logit has a weight of its own."""
    logits = run(model)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    return (weights * logits).sum()
