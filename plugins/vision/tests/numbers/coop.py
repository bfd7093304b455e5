"""In which order CoOp's authors put context vectors and tokens together, what these start from and train:
``python -m peftcore.testing.freeze coop.py CHECKOUT``."""

import ast
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from adaptformer import run_statements
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "KaiyangZhou/CoOp", "ff61507", "trainers/coop.py")
VERSIONS = ("torch",)
ABSENT = ("dassl.engine", "dassl.metrics", "dassl.utils", "dassl.optim", "clip", "clip.simple_tokenizer")
TOKENS = {"X": [3], "cat": [5], "tree frog": [6, 7]}


def tokenized(prompt: str) -> Tensor:
    """A toy tokenizer: ``X X X X name.`` between a start and an end, nine tokens long."""
    name = prompt.removesuffix(".").removeprefix("X X X X ")
    row = [10, *[3] * 4, *TOKENS[name], 4, 11]
    return torch.tensor([row + [0] * (9 - len(row))])


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, list[str]]:
    """Returns, by the place of the class' name, the prompts of two classes: tokens of the table, vectors v of the first
    and w of the second class."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    module.clip.tokenize, module._tokenizer.encode = tokenized, TOKENS.__getitem__
    table = nn.Embedding.from_pretrained(torch.arange(12.0)[:, None])  # each token's vector is its number
    clip = SimpleNamespace(dtype=torch.float32, token_embedding=table, ln_final=nn.LayerNorm(1))
    clip.visual = SimpleNamespace(input_resolution=8)
    found = {}
    for place in ("end", "middle", "front"):
        coop = SimpleNamespace(N_CTX=4, CTX_INIT="", CSC=True, CLASS_TOKEN_POSITION=place)
        config: Any = SimpleNamespace(TRAINER=SimpleNamespace(COOP=coop), INPUT=SimpleNamespace(SIZE=(8, 8)))
        learner = module.PromptLearner(config, ["cat", "tree_frog"], clip)
        learner.ctx.copy_(torch.tensor([[100.0, 101, 102, 103], [200, 201, 202, 203]])[..., None])
        names = {100.0 + i: f"v{i}" for i in range(4)} | {200.0 + i: f"w{i}" for i in range(4)}
        found[place] = [" ".join(names.get(n, f"{n:.0f}") for n in row.flatten().tolist()) for row in learner()]
    return found


def learner(checkout: Path, words: int, width: int, classes: int, own: bool) -> Any:
    """Returns the model of so many classes and words, around stand-ins for both encoders."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    module.clip.tokenize = lambda prompt: torch.zeros(1, words + 4, dtype=torch.long)
    module._tokenizer.encode = str.split
    clip = nn.Module()
    clip.visual, clip.transformer, clip.ln_final = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(width)
    clip.token_embedding, clip.positional_embedding = nn.Embedding(5, width), nn.Parameter(torch.zeros(2))
    clip.text_projection, clip.logit_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))
    clip.dtype, clip.visual.input_resolution = torch.float32, 8
    coop = SimpleNamespace(N_CTX=words, CTX_INIT="", CSC=own, CLASS_TOKEN_POSITION="end")
    config: Any = SimpleNamespace(TRAINER=SimpleNamespace(COOP=coop), INPUT=SimpleNamespace(SIZE=(8, 8)))
    return module.CustomCLIP(config, ["cat"] * classes, clip)


def start(checkout: Path) -> dict[str, Any]:
    """Returns what 1,280 words of width 32 start from, shared by all classes, and 16 of each of 80 classes."""
    shared, own = learner(checkout, 1280, 32, 2, False), learner(checkout, 16, 32, 80, True)
    return {"shared": drawn(shared.prompt_learner.ctx), "own": drawn(own.prompt_learner.ctx)}


def trains(checkout: Path) -> dict[str, Any]:
    """Returns the sizes of what their trainer leaves to train, of 16 words of width 32 and five classes."""
    found = {}
    for name, own in (("shared", False), ("own", True)):
        model = learner(checkout, 16, 32, 5, own)
        run_statements(checkout / SOURCE.script, ast.For, "requires_grad_(False)", self=SimpleNamespace(model=model))
        found[name] = {key: each.numel() for key, each in model.named_parameters() if each.requires_grad}
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options that their script has before a configuration changes them."""
    config = ModuleType("yacs.config")
    vars(config)["CfgNode"] = SimpleNamespace
    asked = SimpleNamespace(TRAINER=SimpleNamespace(), DATASET=SimpleNamespace())
    file = checkout / "train.py"
    (found,) = (each for each in ast.parse(file.read_text()).body if getattr(each, "name", "") == "extend_cfg")
    names: dict[str, Any] = {}
    sys.modules.update({"yacs": ModuleType("yacs"), "yacs.config": config})
    exec(compile(ast.Module([found], []), str(file), "exec"), names)  # code that whoever runs this has chosen
    names["extend_cfg"](asked)
    told = asked.TRAINER.COOP
    assert told.CLASS_TOKEN_POSITION == "end"
    return {"length": told.N_CTX, "classes": told.CSC or None, "init_ids": list(told.CTX_INIT)}
