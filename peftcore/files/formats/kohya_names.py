"""Parses names of tensors in files of kohya, LyCORIS and ComfyUI. A name consists of the model, the module's path and
the tensor.

Files of kohya have underscores instead of dots, ``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight``. Files for
ComfyUI have dots, ``diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight``, and so do files that name no
model: ``double_blocks.0.img_attn.qkv.lora_A.weight``. `understood` parses all of these names.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from peftcore.files.formats.bundled_embeddings import is_word

PARTS = ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer", "lycoris", "oft_unet")
"""Prefixes for models in names with underscores."""
DIFFUSION = "diffusion_model"
PEFTS = "base_model.model"
"""The prefix of names that peft wrote; files in peft's own format have it too."""
DOTTED = (DIFFUSION, PEFTS, *(f"text_encoders.{name}.transformer" for name in ("clip_l", "clip_g", "t5xxl")))
"""Prefixes for models in names with dots. Only the first is used for writing."""
BARE = re.compile(r"(base_model\.model\.)?(double_blocks|single_blocks)\.\d+\.|[^.]+\..*\.lora_(down|up)\.weight$")
"""Matches tensor names that identify a file in which names contain no model."""
LEAVES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "down.weight": "lora_down.weight",
    "up.weight": "lora_up.weight",
}
"""Maps names of tensors in other programs (peft, XLabs) to kohya's names."""


@dataclass(frozen=True)
class KohyaTensorName:
    """The parsed name of a tensor."""

    part: str
    """The prefix for the model; empty if the name has none."""
    stem: str
    """The part before the tensor's own name, as it is in the file."""
    path: str
    """The module's path, with underscores replaced by dots."""
    leaf: str
    """The tensor's name below the module, as kohya and LyCORIS have it."""


def part_of(name: str) -> str | None:
    """Returns the prefix for a model at the start of a tensor's name; None if the name has no known prefix."""
    stem = name.partition(".")[0]
    found = next((part for part in PARTS if stem.startswith(f"{part}_")), None)
    return found or next((part for part in DOTTED if name.startswith(f"{part}.")), None)


def understood(name: str, part: str) -> KohyaTensorName:
    """Returns the parsed name of a tensor. `part` is the name's prefix for the model; empty if it has none."""
    if part in PARTS:
        stem, _, leaf = name.partition(".")
        return KohyaTensorName(part, stem, stem.removeprefix(f"{part}_").replace("_", "."), LEAVES.get(leaf, leaf))
    steps = name.split(".")
    count = 1 if steps[-1] not in ("weight", "bias") else 3 if "default" in steps[-2:-1] else 2
    stem, leaf = ".".join(steps[:-count]), ".".join(steps[-count:])
    path = stem.removeprefix(part).removeprefix(".") if part else stem
    return KohyaTensorName(part, stem, path.replace("_", "."), LEAVES.get(leaf, leaf))


def are_known(names: Collection[str]) -> bool:
    """True if a file with these tensor names has the format of kohya, LyCORIS or ComfyUI."""
    return any(part_of(name) not in (None, PEFTS) or BARE.match(name) or is_word(name) for name in names)


def stem_of(part: str, path: str) -> str:
    """Returns the prefix of the names of a module's tensors in a file."""
    return f"{part}.{path}" if part in DOTTED else f"{part}_{path}".replace(".", "_")
