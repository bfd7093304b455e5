"""Files of kohya: which names a host has in them, and how a file is known."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftcore.files.formats.kohya import TENSORS, Kohya


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("lora_unet_a.lora_down.weight", True),
        ("diffusion_model.a.lora_A.weight", True),
        ("double_blocks.0.img_attn.qkv.lora_A.weight", True),
        ("base_model.model.a.lora_A.weight", False),  # a folder of peft
        ("transformer.a.lora_A.weight", False),  # a file of diffusers
    ],
)
def test_a_file_is_recognized_by_its_names(name: str, known: bool, tmp_path: Path) -> None:
    save_file({name: torch.zeros(1)}, tmp_path / TENSORS)
    assert Kohya.recognizes(tmp_path) is known
