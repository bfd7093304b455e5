"""What the authors' transformer with visual queries gives for images, and the derivatives by its queries and by the
images, on tensors of cosines: ``python -m peftcore.testing.freeze vqt.py CHECKOUT``."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vpt import ABSENT, SIZES, named, wave

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "andytu28/VQT", "9bca87e", "src/models/vit_backbones/h2t_vit.py")
VERSIONS = ("torch",)
KINDS = {"concat": (False, False), "mean": (True, False), "weighted": (False, True)}


def head(module: nn.Linear, features: int) -> nn.Linear:
    """A head of three classes over the class token and queries of `features` numbers."""
    made = nn.Linear(16 + features, 3).double()
    made.weight.data.copy_(torch.cat([wave((3, 16), "head.weight"), wave((3, features), "queries")], 1))
    made.bias.data.copy_(wave((3,), "head.bias"))
    return made


def outputs(module: Any, kind: str, normalize: bool) -> dict[str, Any]:
    """Returns logits ``[2, 3]`` and derivatives of a weighted sum of them, for queries of two rows in three layers."""
    pool, weigh = KINDS[kind]
    options = SimpleNamespace(NUM_QUERY_TOKENS=2, DROPOUT=0.0, NORMALIZE_FEATS=normalize)
    options.POOLING_FEATS, options.WEIGHTED_SUM_FEATS = pool, weigh
    model = module.Head2ToeVisionTransformer("tiny", options, img_size=8, num_classes=3).double().eval()
    known = {name: value for name, value in named().items() if not name.startswith("head")}
    for name, parameter in model.named_parameters():
        if name.endswith("query_prompt_embeddings"):
            parameter.data.copy_(torch.stack([wave((2, 16), f"prompt.{number}") for number in range(3)]))
        elif name == "combine_params":
            parameter.data.copy_(wave((3, 2), "sums"))
        elif not name.startswith("head"):
            value = known.pop(name)
            parameter.data.copy_(value if isinstance(value, Tensor) else wave(parameter.shape, value[0]))
    assert not known
    model.head = head(model.head, 3 * 16 * (2 if kind == "concat" else 1))
    images = wave((2, 3, 8, 8), "images").requires_grad_()
    logits = model(images)
    queries = model.transformer.encoder.query_prompt_embeddings
    found = torch.autograd.grad((logits * wave((2, 3), "direction")).sum(), [queries, images])
    return {"logits": logits.tolist(), "queries": found[0].tolist(), "images": found[1][:, :, 0].tolist()}


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the outputs by how queries are summed up and whether features are brought to length 1."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    module.CONFIGS["tiny"] = SimpleNamespace(patches={"size": (4, 4)}, hidden_size=16, transformer=SIZES, classifier="")
    return {f"{kind} {unit}": outputs(module, kind, unit) for kind in KINDS for unit in (True, False)}
