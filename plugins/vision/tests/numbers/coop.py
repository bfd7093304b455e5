"""In which order CoOp's authors put context vectors and tokens together:
``python -m peftcore.testing.freeze coop.py CHECKOUT``."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
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
