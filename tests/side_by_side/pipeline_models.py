"""What tests of files for pipelines share: a tiny text encoder, its tokenizer, running a model, and when two agree."""

import json
from pathlib import Path
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


def clip_tokenizer(folder: Path) -> Any:
    """A tokenizer of 50 tokens for it, made in a new folder: letters, and the two signs for begin and end."""
    letters = [chr(97 + index) for index in range(24)]
    symbols = [*letters, *(f"{each}</w>" for each in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(str(folder), model_max_length=12)
    assert len(tokenizer) == 50
    return tokenizer


def out(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs)[0]
    return result


def assert_same(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() <= BOUND * scale
    assert (theirs - base).abs().max() >= 1000 * BOUND * scale
