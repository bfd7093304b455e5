"""What the CLIP with prompts of MaPLe's authors gives for images and texts, and the gradients of the prompts and maps,
on tensors of cosines: ``python -m peftcore.testing.freeze maple.py CHECKOUT``."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "muzairkhattak/multimodal-prompt-learning", "69bce21", "trainers/maple.py")
VERSIONS = ("torch",)
ABSENT = ("dassl.engine", "dassl.metrics", "dassl.utils", "dassl.optim", "clip.simple_tokenizer", "clip.clip")
IDS = torch.tensor([[1, 3, 3, 5, 39, 0], [1, 3, 3, 6, 7, 39], [1, 3, 3, 9, 4, 39]])
"""Texts of three classes, each behind two places."""


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


@contextmanager
def in_double() -> Iterator[None]:
    """Computes in float64 where the authors have half precision."""
    kept = Tensor.half
    try:
        Tensor.half = Tensor.double  # type: ignore[method-assign]
        yield
    finally:
        Tensor.half = kept  # type: ignore[method-assign]


def built(checkout: Path, depth: int) -> tuple[Any, Any]:
    """The authors' two towers, 12 and 16 wide with three blocks each, and their prompts."""
    maple = load(checkout / SOURCE.script, checkout, ABSENT)
    clip = load(checkout / "clip/model.py", checkout)
    clip.LayerNorm = nn.LayerNorm  # theirs computes in float32
    design = {"trainer": "MaPLe", "maple_length": 2}
    mask = torch.full((6, 6), float("-inf"), dtype=torch.float64).triu(1)
    text = clip.Transformer(12, 3, 2, mask, text_layer=True, design_details=design)
    visual = clip.VisionTransformer_MaPLe(8, 4, 16, 3, 2, 10, design)
    tower = nn.ModuleDict({"transformer": text, "ln_final": nn.LayerNorm(12), "token_embedding": nn.Embedding(40, 12)})
    whole = nn.ModuleDict({"visual": visual, **tower}).double()
    vectors = {"positional_embedding": wave((6, 12), "positional_embedding")}
    vectors["text_projection"] = wave((12, 10), "text_projection")
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(wave(parameter.shape, name))
    parts = SimpleNamespace(**{name: whole[name] for name in tower}, **vectors, dtype=torch.float64)
    learner = maple.MultiModalPromptLearner.__new__(maple.MultiModalPromptLearner)
    nn.Module.__init__(learner)  # theirs has the widths of ViT-B/16
    learner.ctx = nn.Parameter(wave((2, 12), "rows.0"))
    learner.proj = nn.Linear(12, 16)
    learner.compound_prompts_text = nn.ParameterList([wave((2, 12), f"rows.{j}") for j in range(1, depth)])
    learner.compound_prompt_projections = nn.ModuleList([nn.Linear(12, 16) for _ in range(1, depth)])
    for j, each in enumerate([learner.proj, *learner.compound_prompt_projections]):
        each.weight = nn.Parameter(wave((16, 12), f"map.{j}"))
        each.bias = nn.Parameter(wave((16,), f"bias.{j}"))
    embedded = parts.token_embedding(IDS).detach()
    learner.n_cls, learner.token_prefix, learner.token_suffix = 3, embedded[:, :1], embedded[:, 3:]
    encoder = maple.TextEncoder(parts)
    scale = torch.tensor(1.5, dtype=torch.float64)
    model = SimpleNamespace(
        prompt_learner=learner.eval(), tokenized_prompts=IDS, image_encoder=visual, text_encoder=encoder
    )
    model.logit_scale, model.dtype = scale, torch.float64
    return maple.CustomCLIP.forward, model


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns by depth the logits of two images [2, 3] and the gradients of prompts [2, 12] and maps [16, 12]."""
    found: dict[str, Any] = {}
    for depth in (1, 2, 3):
        with in_double():
            forward, model = built(checkout, depth)
            logits = forward(model, wave((2, 3, 8, 8), "images"))
            (logits * wave((2, 3), "direction")).sum().backward()
        learner = model.prompt_learner
        rows = [learner.ctx, *learner.compound_prompts_text]
        maps = [learner.proj, *learner.compound_prompt_projections]
        found[str(depth)] = {
            "logits": logits.tolist(),
            "rows": [each.grad.tolist() for each in rows],
            "map": [each.weight.grad.tolist() for each in maps],
        }
    return found
