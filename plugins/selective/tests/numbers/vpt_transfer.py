"""What VPT's authors train of an image transformer, its head, or from its last blocks on, and of how many:
``python -m peftcore.testing.freeze vpt_transfer.py CHECKOUT``."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "KMnP/vpt", "4410440", "src/models/vit_models.py")
VERSIONS = ("torch",)
ABSENT = ("turtle", "ml_collections", "src.utils", "src.utils.logging", "src.models.build_vit_backbone")
SIZES = {"mlp_dim": 24, "num_heads": 2, "num_layers": 3, "attention_dropout_rate": 0.0, "dropout_rate": 0.0}
# Parts of their names, and what they are called in timm.
NAMES = {"enc.transformer.encoder.layer": "blocks", "enc.transformer.encoder.encoder_norm": "norm"}
NAMES |= {"head.last_layer": "head", "attention_norm": "norm1", "ffn_norm": "norm2", "ffn.fc": "mlp.fc"}
NAMES |= {"attn.query": "attn.qkv", "attn.key": "attn.qkv", "attn.value": "attn.qkv", "attn.out": "attn.proj"}


def renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def trains(checkout: Path) -> dict[str, list[str]]:
    """Returns timm's names of what trains of three blocks, by the kind of transfer."""
    module, found = load(checkout / SOURCE.script, root=checkout, absent=ABSENT), {}
    backbone = load(checkout / "src/models/vit_backbones/vit.py", root=checkout)
    backbone.CONFIGS["tiny"] = SimpleNamespace(
        patches={"size": (4, 4)}, hidden_size=16, transformer=SIZES, classifier="token"
    )

    def build(*args: object) -> tuple[nn.Module, int]:
        model = backbone.VisionTransformer("tiny", img_size=8, num_classes=-1)
        model.head = nn.Identity()
        return model, 16

    module.build_vit_sup_models = build
    for kind in ("linear", "partial-1", "partial-2"):
        model = SimpleNamespace(TRANSFER_TYPE=kind, MLP_NUM=0, PROMPT=None, MODEL_ROOT="")
        data = SimpleNamespace(FEATURE="tiny", CROPSIZE=8, NUMBER_CLASSES=3)
        trained = module.ViT(SimpleNamespace(MODEL=model, DATA=data)).named_parameters()
        found[kind] = sorted({renamed(name) for name, parameter in trained if parameter.requires_grad})
    return found


def defaults(checkout: Path) -> dict[str, int]:
    """Returns of how many blocks their notebook trains."""
    cells = json.loads((checkout / "demo.ipynb").read_text())["cells"]
    (kind,) = re.findall(
        r'MODEL.TRANSFER_TYPE "partial-(\d+)"', "".join(line for cell in cells for line in cell["source"])
    )
    return {"k": int(kind)}
