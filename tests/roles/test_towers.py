"""Which sub-model of a host something belongs to."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo_maps import host_of, paths

from peftcore.roles import derive

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("llama", set()),
        ("t5", set()),
        ("bart", set()),
        ("whisper", set()),
        ("sd15_unet", set()),
        ("vae_kl", set()),
        ("flux", set()),
        ("timm_resnet50", set()),
        ("timm_levit", set()),
        ("timm_maxvit", set()),
        ("clip", {"text_model", "vision_model"}),
        ("siglip", {"text_model", "vision_model"}),
        ("llava", {"model.vision_tower", "model.language_model"}),
        ("qwen2_vl", {"model.visual", "model.language_model"}),
        ("gemma3", {"model.vision_tower", "model.language_model"}),
        ("sam", {"vision_encoder", "mask_decoder"}),
        ("detr", {"model.backbone"}),
    ],
)
def test_towers(name: str, towers: set[str]) -> None:
    assert {entry.tower for entry in host_of(name).entries} == towers | {""}


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("clip", {"text": "text_model", "vision": "vision_model"}),
        ("llava", {"vision": "model.vision_tower", "text": "model.language_model"}),
        ("qwen2_vl", {"vision": "model.visual", "text": "model.language_model"}),
        ("sam", {"vision": "vision_encoder"}),
        ("wav2vec2", {"audio": ""}),
        ("timm_resnet50", {"vision": ""}),
        ("t5", {"text": ""}),
        pytest.param("whisper", {}, id="whisper: one tower that hears and reads"),
    ],
)
def test_towers_by_what_they_take_in(name: str, towers: dict[str, str]) -> None:
    assert host_of(name).named_towers == {sense: (path,) for sense, path in towers.items()}


def test_blocks_whose_stream_is_a_grid() -> None:
    """MaxViT mixes features by convolutions; TinyViT's are depthwise and Mamba's go over a sequence."""
    assert {name: _on_grid(name) for name in ("timm_maxvit", "timm_tiny_vit", "mamba", "timm_resnet18", "vit")} == {
        "timm_maxvit": True,
        "timm_tiny_vit": False,
        "mamba": False,
        "timm_resnet18": True,
        "vit": False,
    }


def _on_grid(name: str) -> bool:
    host = host_of(name)
    return host.on_grid(host.select("block")[-1][0].path)


def test_select_takes_one_tower() -> None:
    host = host_of("clip")
    text, both = paths(host, "attn.q", "text_model"), paths(host, "attn.q")
    assert len(text) == 2 and all(path.startswith("text_model.") for path in text)
    assert len(both) == 4
    assert len(paths(host, "all-linear", "vision_model")) == 12


def test_the_main_tower_has_most_parameters_in_its_blocks() -> None:
    assert host_of("llama").main_tower() == ""
    assert host_of("qwen2_vl").main_tower() == "model.language_model"
    assert host_of("clip").main_tower() == "vision_model"
    assert host_of("detr").main_tower() == ""
    assert derive(nn.Linear(2, 2)).main_tower() == ""
