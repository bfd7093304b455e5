"""What tests of files for pipelines share: a tiny text encoder, running a model, and when two agree."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

BOUND = 1e-5
"""Accepted difference of outputs, relative to the largest; they must have moved by a thousand times that."""


def clip(hidden: int = 16, layers: int = 2) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(hidden)
    config = transformers.CLIPTextConfig(
        hidden_size=hidden, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, vocab_size=50,
        max_position_embeddings=12, eos_token_id=49, bos_token_id=48, pad_token_id=49,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()


def out(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs)[0]
    return result


def assert_same(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() <= BOUND * scale
    assert (theirs - base).abs().max() >= 1000 * BOUND * scale
