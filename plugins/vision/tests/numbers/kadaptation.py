"""What KAdaptation's authors add to queries and values, with gradients, on tensors of sines, what it starts from, what
trains, and their options: ``python -m peftcore.testing.freeze kadaptation.py CHECKOUT``."""

import importlib.util
import math
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "eric-ai-lab/PEViT", "be6fb43", "vision_benchmark/evaluation/model.py")
VERSIONS = ("torch",)
WIDTH = 64
# What their classifier imports, of which nothing is needed.
ABSENT = ("nltk", "nltk.corpus", "nltk.tokenize", "vision_datasets", "vision_benchmark", "vision_benchmark.datasets")
ABSENT += ("vision_benchmark.evaluation", "authors", "authors.common", "authors.common.constants", "authors.datasets")
ABSENT += ("authors.evaluation", "authors.evaluation.clip_load", "authors.evaluation.feature", "authors.models")
ABSENT += ("authors.evaluation.metric", "authors.optim")
# Parts of their names of tensors, and what they are called here.
PARTS = {"backbone.visual.transformer.": "", "resblocks.0.attn.": "", "layers.0.": "head.", "_proj_adapter1_left": ".u"}
PARTS |= {"_proj_adapter1_right": ".v", "phm_rule1_": "q.rule.", "phm_rule2_": "v.rule."}


def wave(shape: Sequence[int], key: str) -> Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97
    return 0.3 * torch.sin(steps).view(*shape)


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns what is added to eight features of two tokens, and gradients of tokens and of all tensors in part."""
    module = load(checkout / SOURCE.script)
    transformer: Any = module.Transformer(WIDTH, 1, 2, kattention=True).double().eval()
    attention = transformer.resblocks[0].attn
    tensors = {name: p for name, p in attention.named_parameters() if "adapter" in name or name == "b"}
    tensors |= {name: p for name, p in transformer.named_parameters() if name.startswith("phm_rule")}
    with torch.no_grad():
        for name, parameter in tensors.items():
            parameter.copy_(wave(parameter.shape, name))
    found: dict[str, Any] = {}
    for which in ("q", "v"):
        x = wave((2, 1, WIDTH), "x").requires_grad_()
        added = attention.adapter_forward(x, matrix=which)
        transformer.zero_grad()
        (added * wave(added.shape, "direction")).sum().backward()
        assert x.grad is not None
        parts = {"added": added[:, 0, :8], "x": x.grad[:, 0, :8]}
        number = "12"[which == "v"]
        # of values too the code takes the matrices u v of queries
        own = {name: p for name, p in tensors.items() if name.startswith(("q_proj", f"phm_rule{number}"))}
        parts |= {name: p.grad.flatten()[:6] for name, p in own.items()}
        found[which] = {name: part.flatten().tolist() for name, part in parts.items()}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what their tensors start from, matrices of rules together; what the draw gives that they name for u and
    v; and how large the gradients of u, v and the rules are in the first step."""
    module = load(checkout / SOURCE.script)
    transformers = [module.Transformer(WIDTH, 1, 2, kattention=True).eval() for _ in range(10)]
    rules = [p for each in transformers for name, p in each.named_parameters() if name.startswith("phm_rule")]
    attention = transformers[0].resblocks[0].attn
    u, v = attention.q_proj_adapter1_left, attention.q_proj_adapter1_right
    attention.adapter_forward(torch.randn(8, 1, WIDTH), matrix="q").sin().sum().backward()
    gradients = torch.cat([each.grad.flatten() for each in (u, v, *rules[:2])])
    found = {"rule": torch.cat([each.flatten() for each in rules]), "u": u, "v": v, "bias": attention.b}
    found |= {"glorot": torch.stack([module.glorot_uniform(torch.empty(20_000, 1)) for _ in range(2)])}
    found["gradients"] = gradients
    return {"named": attention.w_init, **{name: drawn(each) for name, each in found.items()}}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what trains in their classifier over a CLIP of one block."""
    sizes = {
        "embed_dim": WIDTH,
        "image_resolution": 8,
        "vision_layers": 1,
        "vision_width": WIDTH,
        "vision_patch_size": 4,
    }
    sizes |= {"context_length": 4, "vocab_size": 9, "transformer_width": 8, "transformer_heads": 1}
    clip = load(checkout / SOURCE.script).CLIP(**sizes, transformer_layers=1)
    for name in ABSENT:
        sys.modules[name] = MagicMock()
    file = checkout / "vision_benchmark/evaluation/kadaptation_clip.py"
    spec = importlib.util.spec_from_file_location("authors.evaluation.kadaptation_clip", file)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.get_cls_model = lambda config, feature_type: clip
    flags = ("FREEZE_IMAGE_BACKBONE", "INIT_HEAD_WITH_TEXT_ENCODER", "MERGE_ENCODER_AND_HEAD_PROJ")
    flags += ("TRAINABLE_LOGIT_SCALE", "NORMALIZE_VISUAL_FEATURE", "USE_CHANNEL_BN")
    config = SimpleNamespace(TRAIN=SimpleNamespace(**dict.fromkeys(flags, False), LOGIT_SCALE_INIT="none"))
    config.MODEL = SimpleNamespace(NAME="clip", SPEC=SimpleNamespace(EMBED_DIM=WIDTH))
    config.DATASET = SimpleNamespace(NUM_CLASSES=3)
    model, found = module.Classifier(config, 0.0), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for theirs, ours in PARTS.items():
                name = name.replace(theirs, ours)
            found[name] = parameter.numel()
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the sizes of theirs, the factor by which an update of ones is added, its dropout, and the bound of the
    draw of the rules."""
    transformer: Any = load(checkout / SOURCE.script).Transformer(WIDTH, 1, 2, kattention=True)
    attention = transformer.resblocks[0].attn.eval()
    rules = [each for name, each in transformer.named_parameters() if name.startswith("phm_rule")]
    found = {"products": attention.phm_dim, "rank": attention.phm_rank, "dropout": attention.kdropout.p}
    found["rule_range"] = round(max(each.abs().max().item() for each in rules), 4)
    with torch.no_grad():
        for each in (*rules, attention.q_proj_adapter1_left, attention.q_proj_adapter1_right):
            each.fill_(1.0)
        added = attention.adapter_forward(torch.eye(WIDTH)[:1, None], matrix="q")
    return {**found, "scale": added[0, 0, 0].item() / attention.phm_dim}
