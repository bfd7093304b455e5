"""What the prompted transformer of VPT's authors gives for images, with prompts in front of each layer or of
the first one, on tensors of cosines: ``python -m peftcore.testing.freeze vpt.py CHECKOUT``."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "KMnP/vpt", "4410440", "src/models/vit_prompt/vit.py")
VERSIONS = ("torch",)
ABSENT = ("turtle", "ml_collections", "src.utils", "src.utils.logging")
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


@torch.no_grad()
def logits(module: Any, deep: bool) -> dict[str, list[list[float]]]:
    """Returns the logits of two images, ``[2, 3]``, by the width from which prompts are projected."""
    found = {}
    options = {"LOCATION": "prepend", "INITIATION": "random", "NUM_DEEP_LAYERS": None, "DEEP_SHARED": False}
    options |= {"NUM_TOKENS": 2, "DROPOUT": 0.0, "DEEP": deep, "VIT_POOL_TYPE": "original"}
    for projection in (None, 6):
        prompt = SimpleNamespace(**options, PROJECT=-1 if projection is None else projection)
        model = module.PromptedVisionTransformer(prompt, "tiny", img_size=8, num_classes=3).double().eval()
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
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    module.CONFIGS["tiny"] = SimpleNamespace(patches={"size": (4, 4)}, hidden_size=16, transformer=SIZES, classifier="")
    return {"deep": logits(module, True), "shallow": logits(module, False)}
