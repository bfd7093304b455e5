"""What the CLIP of CoCoOp's authors gives for images and texts with shifted words, and the gradients of these words and
of the network, on tensors of cosines; what they start from and train:
``python -m peftcore.testing.freeze cocoop.py CHECKOUT``."""

import ast
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from adaptformer import run_statements
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
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


def learner(checkout: Path, words: int, width: int, features: int) -> Any:
    """Returns the model of one class with so many words, around stand-ins for both encoders."""
    cocoop = load(checkout / SOURCE.script, checkout, ABSENT)
    cocoop._tokenizer.encode = str.split
    cocoop.clip.tokenize = lambda prompt: torch.zeros(1, words + 4, dtype=torch.long)
    clip = nn.Module()
    clip.visual, clip.transformer, clip.ln_final = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(width)
    clip.token_embedding, clip.positional_embedding = nn.Embedding(5, width), nn.Parameter(torch.zeros(2))
    clip.text_projection, clip.logit_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))
    clip.dtype, clip.visual.input_resolution, clip.visual.output_dim = torch.float32, 8, features
    options = SimpleNamespace(N_CTX=words, CTX_INIT="", PREC="fp32")
    config = SimpleNamespace(TRAINER=SimpleNamespace(COCOOP=options), INPUT=SimpleNamespace(SIZE=(8, 8)))
    return cocoop.CustomCLIP(config, ["5"], clip)


def start(checkout: Path) -> dict[str, Any]:
    """Returns what 1,280 words of width 32, and a network from 512 features to 1,280, start from."""
    found = {"context": learner(checkout, 1280, 32, 512).prompt_learner.ctx}
    network = learner(checkout, 2, 1280, 1024).prompt_learner.meta_net
    for name, layer in (("down", network.linear1), ("up", network.linear2)):
        found |= {f"{name}.{kind}": each for kind, each in layer.named_parameters()}
    return {name: drawn(each) for name, each in found.items() if each.dim() > 1}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what their trainer leaves to train: 2 words of 12, and 32 features of an image."""
    model = learner(checkout, 2, 12, 32)
    names = {"self": SimpleNamespace(model=model), "name_to_update": "prompt_learner"}
    run_statements(checkout / SOURCE.script, ast.For, "requires_grad_(False)", **names)
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the words in the configuration that their script for CoCoOp takes, and how narrow the network is."""
    script = (checkout / "scripts/cocoop/base2new_train.sh").read_text()
    (name,) = (line.removeprefix("CFG=") for line in script.splitlines() if line.startswith("CFG="))
    told = yaml.safe_load((checkout / f"configs/trainers/CoCoOp/{name}.yaml").read_text())["TRAINER"]["COCOOP"]
    layer = learner(checkout, 2, 12, 64).prompt_learner.meta_net.linear1
    reduction = layer.in_features // layer.out_features
    return {"length": told["N_CTX"], "init_ids": told["CTX_INIT"], "reduction": reduction}
