"""What the CLIP with prompts of MaPLe's authors gives for images and texts, and the gradients of the prompts and maps,
on tensors of cosines, what these start from, what trains, and their configuration:
``python -m peftcore.testing.freeze maple.py CHECKOUT``."""

import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "muzairkhattak/multimodal-prompt-learning", "69bce21", "trainers/maple.py")
VERSIONS = ("torch",)
CONFIGURATION = "configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml"
ABSENT = ("dassl.metrics", "dassl.utils", "dassl.optim", "clip.simple_tokenizer", "clip.clip")
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


def trainers(checkout: Path) -> Any:
    """Returns their module, with the base of their trainer, and a tokenizer of zeros."""
    registry = SimpleNamespace(register=lambda: lambda trainer: trainer)
    engine: Any = SimpleNamespace(TRAINER_REGISTRY=registry, TrainerX=object)
    sys.modules["dassl"] = sys.modules["dassl.engine"] = engine
    maple = load(checkout / SOURCE.script, checkout, ABSENT)
    maple.clip.tokenize = lambda text: torch.zeros(1, 6, dtype=torch.long)
    return maple


def built(checkout: Path, depth: int) -> tuple[Any, Any]:
    """The authors' two towers, 12 and 16 wide with three blocks each, and their prompts."""
    maple = trainers(checkout)
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


def configured(length: int, depth: int) -> Any:
    """Returns a configuration with drawn prompts."""
    maple = SimpleNamespace(N_CTX=length, CTX_INIT="", PROMPT_DEPTH=depth, PREC="fp32")
    names = SimpleNamespace(BACKBONE=SimpleNamespace(NAME=""), INIT_WEIGHTS="")
    return SimpleNamespace(TRAINER=SimpleNamespace(MAPLE=maple), INPUT=SimpleNamespace(SIZE=[8]), MODEL=names, OPTIM={})


def towers(checkout: Path) -> Any:
    """Returns their CLIP, of two blocks, as wide as that of ViT-B/16, on which their prompts rely."""
    design = {"trainer": "MaPLe", "maple_length": 2, "vision_depth": 0, "language_depth": 0}
    sizes = {"image_resolution": 8, "vision_layers": 2, "vision_width": 768, "vision_patch_size": 4}
    sizes |= {"context_length": 6, "vocab_size": 40, "transformer_width": 512, "transformer_heads": 8}
    model = load(checkout / "clip/model.py", checkout).CLIP(16, **sizes, transformer_layers=2, design_details=design)
    return model.float()


def start(checkout: Path) -> dict[str, Any]:
    """Returns what their prompts and maps start from, of which they make deeper ones by copying one draw."""
    maple, clip = trainers(checkout), towers(checkout)
    with mock.patch.object(nn.Module, "half", lambda module: module):  # what is drawn, in front of its rounding
        learners = [maple.MultiModalPromptLearner(configured(4, 2), ["a"], clip) for _ in range(20)]
    deeper = [each.compound_prompt_projections[0] for each in learners]
    found = {"rows.0": [each.ctx for each in learners], "rows.1": [each.compound_prompts_text[0] for each in learners]}
    found |= {"map.0.weight": [learners[0].proj.weight], "map.0.bias": [each.proj.bias for each in learners]}
    found |= {"map.1.weight": [deeper[0].weight], "map.1.bias": [each.bias for each in deeper]}
    return {name: drawn(torch.cat([each.flatten().float() for each in tensors])) for name, tensors in found.items()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what trains when their trainer makes a model of two depths."""
    maple, clip = trainers(checkout), towers(checkout)
    maple.load_clip_to_cpu = lambda cfg: clip
    trainer = maple.MaPLe.__new__(maple.MaPLe)
    trainer.cfg, trainer.device = configured(2, 2), "cpu"
    trainer.dm = SimpleNamespace(dataset=SimpleNamespace(classnames=["a", "b"]))
    trainer.register_model = lambda *args: None
    trainer.build_model()
    found = {name: each.numel() for name, each in trainer.model.named_parameters() if each.requires_grad}
    names = {"ctx": "rows.0", "compound_prompts_text.0": "rows.1"}
    for kind in ("weight", "bias"):
        names |= {f"proj.{kind}": f"map.0.{kind}", f"compound_prompt_projections.0.{kind}": f"map.1.{kind}"}
    return {names[name.removeprefix("prompt_learner.")]: size for name, size in found.items()}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration, with the words whose ids are an option here."""
    found = yaml.safe_load((checkout / CONFIGURATION).read_text())["TRAINER"]["MAPLE"]
    return {"length": found["N_CTX"], "depth": found["PROMPT_DEPTH"], "init_ids": found["CTX_INIT"]}
