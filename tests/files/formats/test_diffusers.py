"""LoRA files of diffusers: what its names say, old and new ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftcore.files.formats.diffusers import LAYERS, METADATA, TENSORS, Diffusers, understood

A, B = "lora_A.weight", "lora_B.weight"


@pytest.mark.parametrize(
    ("name", "path", "leaf"),
    [
        ("unet.mid.attn.to_q.lora_A.weight", "unet.mid.attn.to_q", A),
        ("unet.mid.attn.to_q.lora.up.weight", "unet.mid.attn.to_q", B),
        ("unet.mid.attn.processor.to_q.lora.down.weight", "unet.mid.attn.to_q", A),
        ("text_encoder.q_proj.lora_linear_layer.down.weight", "text_encoder.q_proj", A),
        ("unet.mid.attn.to_q.lora_magnitude_vector.weight", "unet.mid.attn.to_q", "lora_magnitude_vector"),
        ("unet.mid.attn.processor.to_out_lora.up.weight", "unet.mid.attn.to_out.0", B),
        ("unet.mid.attn.to_q.alpha", "unet.mid.attn.to_q", "alpha"),
    ],
)
def test_names_old_and_new(name: str, path: str, leaf: str) -> None:
    said = understood(name)
    assert said is not None and said.at(LAYERS[0]) == (path, leaf)


def test_layers_of_a_processor_are_called_otherwise_in_a_text_encoder() -> None:
    said = understood("text_encoder.layers.0.self_attn.to_q_lora.down.weight")
    assert said is not None and said.at(LAYERS[1]) == ("text_encoder.layers.0.self_attn.q_proj", A)


@pytest.mark.parametrize("name", ["unet.mid.attn.to_q.weight", "lora_unet_mid.lora_down.weight", "to_q.hada_w1_a"])
def test_names_that_are_none_of_a_lora_of_diffusers(name: str) -> None:
    assert understood(name) is None


@pytest.mark.parametrize(
    ("names", "metadata", "recognized"),
    [
        ({"unet.a.lora_A.weight"}, {}, True),
        ({"a.anything"}, {METADATA: "{}"}, True),
        ({"base_model.model.a.lora_A.weight"}, {}, False),  # a folder of peft
        ({"a.alpha"}, {}, False),
        ({"a.weight"}, {}, False),
    ],
)
def test_a_file_is_recognized_by_its_names(
    names: set[str], metadata: dict[str, str], recognized: bool, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / TENSORS, metadata=metadata or None)
    assert Diffusers.recognizes(tmp_path) is recognized
