"""What the authors' transformer with visual queries gives for images, and the derivatives by its queries and by the
images, on tensors of cosines; what queries start from, what trains, and the options of commands:
``python -m peftcore.testing.freeze vqt.py CHECKOUT``."""

import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vpt import ABSENT, SIZES, named, wave

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "andytu28/VQT", "9bca87e", "src/models/vit_backbones/h2t_vit.py")
VERSIONS = ("torch",)
BUILT = ("easydict", "src.utils", "src.utils.logging", "src.models.build_vit_backbone", "src.models.build_model")
BUILT += ("src.models.vit_backbones.h2t_vit_mae",)
KINDS = {"concat": (False, False), "mean": (True, False), "weighted": (False, True)}


def transformers(checkout: Path) -> Any:
    """Returns their module, with the sizes of the model."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    module.CONFIGS["tiny"] = SimpleNamespace(patches={"size": (4, 4)}, hidden_size=16, transformer=SIZES, classifier="")
    return module


def head(module: nn.Linear, features: int) -> nn.Linear:
    """A head of three classes over the class token and queries of `features` numbers."""
    made = nn.Linear(16 + features, 3).double()
    made.weight.data.copy_(torch.cat([wave((3, 16), "head.weight"), wave((3, features), "queries")], 1))
    made.bias.data.copy_(wave((3,), "head.bias"))
    return made


def asking(module: Any, kind: str, normalize: bool, length: int) -> Any:
    """Returns the transformer with queries."""
    pool, weigh = KINDS[kind]
    options = SimpleNamespace(NUM_QUERY_TOKENS=length, DROPOUT=0.0, NORMALIZE_FEATS=normalize)
    options.POOLING_FEATS, options.WEIGHTED_SUM_FEATS = pool, weigh
    return module.Head2ToeVisionTransformer("tiny", options, img_size=8, num_classes=3)


def outputs(module: Any, kind: str, normalize: bool) -> dict[str, Any]:
    """Returns logits ``[2, 3]`` and derivatives of a weighted sum of them, for queries of two rows in three layers."""
    model = asking(module, kind, normalize, 2).double().eval()
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
    module = transformers(checkout)
    return {f"{kind} {unit}": outputs(module, kind, unit) for kind in KINDS for unit in (True, False)}


def classifier(checkout: Path, kind: str, length: int) -> Any:
    """Returns their classifier of three classes, with its head."""
    model = asking(transformers(checkout), kind, True, length)
    model.head = nn.Identity()
    built = load(checkout / "src/models/build_h2t_model.py", root=checkout, absent=BUILT)
    read = 16 + 3 * 16 * (length if kind == "concat" else 1)
    built.build_h2t_vit_sup_models = lambda *args, **kwargs: (model, read)
    told = SimpleNamespace(TRANSFER_TYPE="h2t-prompt", H2T=None, MODEL_ROOT="", MLP_NUM=0)
    return built.H2TViT(SimpleNamespace(MODEL=told, DATA=SimpleNamespace(FEATURE="", CROPSIZE=8, NUMBER_CLASSES=3)))


def start(checkout: Path) -> dict[str, Any]:
    """Returns what 1,000 queries of three layers start from, together; and the weights of sums."""
    model = asking(transformers(checkout), "weighted", True, 1000)
    queries = model.transformer.encoder.query_prompt_embeddings
    return {"queries": drawn(queries), "sums": drawn(model.combine_params)}


def trains(checkout: Path) -> dict[str, dict[str, int]]:
    """Returns the sizes of what trains, by how queries are summed up."""
    named = {kind: classifier(checkout, kind, 2).named_parameters() for kind in KINDS}
    return {kind: {name: p.numel() for name, p in each if p.requires_grad} for kind, each in named.items()}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration, with the dropout of their script, and the number of queries that most
    of their commands have."""
    node: Any = SimpleNamespace(CfgNode=SimpleNamespace)
    sys.modules["src.configs.config_node"] = node  # its library is for files
    told = load(checkout / "src/configs/config.py", root=checkout)._C.MODEL.H2T
    script = shlex.split((checkout / "scripts/VQT/run_vqt_vtab.sh").read_text())
    commands = [shlex.split(line) for line in (checkout / "run_demo_exp.sh").read_text().splitlines()]
    lengths = [int(each[5]) for each in commands if each[1:2] == ["scripts/VQT/run_vqt_vtab.sh"]]
    found = {"length": statistics.mode(lengths), "dropout": float(script[script.index("MODEL.H2T.DROPOUT") + 1])}
    (kind,) = (each for each, own in KINDS.items() if own == (told.POOLING_FEATS, told.WEIGHTED_SUM_FEATS))
    return {**found, "summary": kind, "normalize": told.NORMALIZE_FEATS}
