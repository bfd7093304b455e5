"""What the prompted transformer of VPT's authors gives for images, with prompts in front of each layer or of
the first one, on tensors of cosines; what prompts start from, what trains, and their configuration:
``python -m peftcore.testing.freeze vpt.py CHECKOUT``."""

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "KMnP/vpt", "4410440", "src/models/vit_prompt/vit.py")
VERSIONS = ("torch",)
ABSENT = ("turtle", "ml_collections", "src.utils", "src.utils.logging")
BACKBONES = ("src.models.build_vit_backbone", "src.utils", "src.utils.logging")
SIZES = {"mlp_dim": 24, "num_heads": 2, "num_layers": 3, "attention_dropout_rate": 0.0, "dropout_rate": 0.0}
# Parts of a layer, and what they are called in timm, on whose names the numbers depend.
PARTS = {"attention_norm": "norm1", "ffn_norm": "norm2", "ffn.fc1": "mlp.fc1", "ffn.fc2": "mlp.fc2"}
PARTS |= {"attn.out": "attn.proj"}


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def named() -> dict[str, Tensor]:
    """The tensors of the model, which is 16 wide and has five tokens."""
    names = {"embeddings.position_embeddings": "pos_embed", "embeddings.cls_token": "cls_token"}
    found = {f"transformer.{theirs}": (ours, None) for theirs, ours in names.items()}
    names = {"transformer.embeddings.patch_embeddings": "patch_embed.proj", "head": "head"}
    names["transformer.encoder.encoder_norm"] = "norm"
    for layer in range(3):
        start = f"transformer.encoder.layer.{layer}"
        names |= {f"{start}.{theirs}": f"blocks.{layer}.{ours}" for theirs, ours in PARTS.items()}
        for third, part in enumerate(("query", "key", "value")):
            for kind, shape in (("weight", (48, 16)), ("bias", (48,))):
                found[f"{start}.attn.{part}.{kind}"] = wave(shape, f"blocks.{layer}.attn.qkv.{kind}").chunk(3)[third]
    for theirs, ours in names.items():
        found |= {f"{theirs}.{kind}": (f"{ours}.{kind}", None) for kind in ("weight", "bias")}
    return found


def transformers(checkout: Path) -> Any:
    """Returns their module, with the sizes of the model."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    module.CONFIGS["tiny"] = SimpleNamespace(patches={"size": (4, 4)}, hidden_size=16, transformer=SIZES, classifier="")
    return module


def prompted(module: Any, deep: bool, length: int, projection: int | None = None) -> Any:
    """Returns the model with prompts."""
    options = {"LOCATION": "prepend", "INITIATION": "random", "NUM_DEEP_LAYERS": None, "DEEP_SHARED": False}
    options |= {"NUM_TOKENS": length, "DROPOUT": 0.0, "DEEP": deep, "VIT_POOL_TYPE": "original"}
    prompt = SimpleNamespace(**options, PROJECT=-1 if projection is None else projection)
    return module.PromptedVisionTransformer(prompt, "tiny", img_size=8, num_classes=3)


@torch.no_grad()
def logits(module: Any, deep: bool) -> dict[str, list[list[float]]]:
    """Returns the logits of two images, ``[2, 3]``, by the width from which prompts are projected."""
    found = {}
    for projection in (None, 6):
        model = prompted(module, deep, 2, projection).double().eval()
        known = named()
        for name, parameter in model.named_parameters():
            if name.endswith("prompt_embeddings"):
                first = int("deep" in name)
                prompts = [wave(each.shape, f"prompt.{first + number}") for number, each in enumerate(parameter)]
                parameter.copy_(torch.stack(prompts))
            elif "prompt_proj" in name:
                parameter.copy_(wave(parameter.shape, f"projection.{name.rpartition('.')[2]}"))
            else:
                value = known.pop(name)
                parameter.copy_(value if isinstance(value, Tensor) else wave(parameter.shape, value[0]))
        assert not known
        found[str(projection)] = model(wave((2, 3, 8, 8), "images")).tolist()
    return found


def numbers(checkout: Path) -> dict[str, dict[str, list[list[float]]]]:
    """Returns the logits with deep prompts and with shallow ones."""
    module = transformers(checkout)
    return {"deep": logits(module, True), "shallow": logits(module, False)}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what prompts of 16 numbers start from, the later ones together; prompts of 1000 that are projected; and
    the map of these, its biases from many models."""
    module = transformers(checkout)
    found: dict[str, Any] = {}
    for kind, deep in (("deep", True), ("shallow", False)):
        plain = prompted(module, deep, 2500).transformer
        projected = [prompted(module, deep, 40, 1000).transformer for _ in range(300)]
        first = projected[0]
        tensors = {"first": plain.prompt_embeddings, "projected": first.prompt_embeddings}
        if deep:
            tensors["later"] = plain.deep_prompt_embeddings
        tensors["weight"] = first.prompt_proj.weight
        tensors["bias"] = torch.cat([each.prompt_proj.bias for each in projected])
        found[kind] = {name: drawn(each) for name, each in tensors.items()}
    return found


def trains(checkout: Path) -> dict[str, dict[str, int]]:
    """Returns the sizes of what trains in their classifier."""
    vit, module = load(checkout / "src/models/vit_models.py", root=checkout, absent=BACKBONES), transformers(checkout)
    found = {}
    for kind, deep in (("deep", True), ("shallow", False)):
        model = prompted(module, deep, 5)
        model.head = torch.nn.Identity()  # as theirs that builds it
        vit.build_vit_sup_models = lambda *args, model=model: (model, 16)
        told = SimpleNamespace(TRANSFER_TYPE="prompt", PROMPT=model.prompt_cfg, MODEL_ROOT="", MLP_NUM=0)
        config = SimpleNamespace(MODEL=told, DATA=SimpleNamespace(FEATURE="", CROPSIZE=8, NUMBER_CLASSES=3))
        named = vit.ViT(config).named_parameters()
        found[kind] = {name: each.numel() for name, each in named if each.requires_grad}
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration; a projection of -1 is none."""
    node: Any = SimpleNamespace(CfgNode=SimpleNamespace)
    sys.modules["src.configs.config_node"] = node  # its library is for files
    found = load(checkout / "src/configs/config.py", root=checkout)._C.MODEL.PROMPT
    projection = found.PROJECT if found.PROJECT > -1 else None
    return {"length": found.NUM_TOKENS, "dropout": found.DROPOUT, "projection": projection}
