"""What the CLIP of CoCoOp's authors gives for images and texts with shifted words, and the gradients of these words and
of the network, on tensors of cosines: ``python -m peftcore.testing.freeze cocoop.py CHECKOUT``."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "KaiyangZhou/CoOp", "ff61507", "trainers/cocoop.py")
VERSIONS = ("torch",)
ABSENT = ("dassl.engine", "dassl.metrics", "dassl.utils", "dassl.optim", "clip.simple_tokenizer", "clip.clip")
IDS = torch.tensor([[1, 3, 3, 5, 39, 0], [1, 3, 3, 6, 7, 39], [1, 3, 3, 9, 4, 39]])
"""Texts of three classes, each behind two places."""


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the logits of two images [2, 3], and gradients: of words [2, 12], and of both matrices."""
    cocoop = load(checkout / SOURCE.script, checkout, ABSENT)
    code = load(checkout / "clip/model.py", checkout)
    code.LayerNorm = nn.LayerNorm  # theirs computes in float32
    mask = torch.full((6, 6), float("-inf"), dtype=torch.float64).triu(1)
    clip = nn.Module()
    clip.visual = code.VisionTransformer(8, 4, 16, 3, 2, 32)
    clip.transformer = code.Transformer(12, 3, 2, mask)
    clip.ln_final, clip.token_embedding = nn.LayerNorm(12), nn.Embedding(40, 12)
    clip.positional_embedding = nn.Parameter(torch.empty(6, 12))
    clip.text_projection = nn.Parameter(torch.empty(12, 32))
    clip.double().requires_grad_(False)
    for name, parameter in clip.named_parameters():
        parameter.copy_(wave(parameter.shape, name))
    clip.dtype, clip.logit_scale = torch.float64, torch.tensor(1.5, dtype=torch.float64)
    names = ["5 39 0", "6 7 39", "9 4 39"]
    cocoop._tokenizer.encode = str.split
    cocoop.clip.tokenize = lambda prompt: torch.tensor([[1, 3, 3, *map(int, prompt[3:-1].split())]])
    options = SimpleNamespace(N_CTX=2, CTX_INIT="", PREC="fp32")
    config = SimpleNamespace(TRAINER=SimpleNamespace(COCOOP=options), INPUT=SimpleNamespace(SIZE=(8, 8)))
    model = cocoop.CustomCLIP(config, names, clip).eval()
    assert torch.equal(model.tokenized_prompts, IDS)
    learner = model.prompt_learner.double()
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            parameter.copy_(wave(parameter.shape, name))
    logits = model(wave((2, 3, 8, 8), "images"))
    (logits * wave((2, 3), "direction")).sum().backward()
    found = {"logits": logits, "context": learner.ctx.grad}
    found |= {"down": learner.meta_net.linear1.weight.grad, "up": learner.meta_net.linear2.weight.grad}
    return {name: each.tolist() for name, each in found.items()}
