"""Control-LoRA in files of Stability, which diffusers reads; and the layout of its published files."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.algebra.exporting import export
from peftcore.author import BorrowedLayer, Tap
from peftcore.errors import CheckpointError, ExportError, HostMismatch
from peftcore.files.readers.check import check
from peftcore.files.readers.reader import reader_named
from peftcore.layers.detect import dense_layer
from peftcore.testing import against
from peftcore.testing.hosts import HOSTS
from peftcore_diffusion.interop.control_lora import named

WIDTHS = [4, 6, 7, 9]
SIZES: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 14,
    "use_linear_projection": True,
}
"""Of a UNet of SDXL, two resnets to a block, as their reader takes for granted."""
XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}


def unet() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**SIZES, **XL).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.rand(2, 6)}
    states = torch.randn(2, 5, 14)
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": states,
        "added_cond_kwargs": added,
    }


def adapted(base: nn.Module, **options: Any) -> tuple[nn.Module, peftcore.Injection]:
    model = deepcopy(base)
    injection = peftcore.apply(model, "controlnet_lora", **{"widths": WIDTHS, "channels": 1, "rank": 3, **options})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, injection


def out(model: nn.Module, inputs: dict[str, Any], image: Tensor) -> Tensor:
    with peftcore.call(model, condition=image), torch.no_grad():
        found: Tensor = model(**inputs).sample
    return found


@against("diffusers 0.42", "controlnet_lora")
def test_diffusers_computes_the_same_of_a_file(tmp_path: Path) -> None:
    """It drops the biases of layers that have updates (its keys lack peft's ``base_layer``), so here they are the
    UNet's."""
    base, inputs = unet()
    model, injection = adapted(base)
    (network,) = injection.shared.values()
    for layer in network.modules():
        if isinstance(layer, BorrowedLayer) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    injection.save(tmp_path / "ours.safetensors", format="control_lora")
    theirs = diffusers.ControlNetModel.from_unet(
        base, conditioning_embedding_out_channels=tuple(WIDTHS), conditioning_channels=1
    )
    theirs.load_lora_adapter(load_file(tmp_path / "ours.safetensors"), prefix=None, controlnet_config=theirs.config)
    image = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        down, mid = theirs.eval()(**inputs, controlnet_cond=image, return_dict=False)
        expected = base(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert (expected - base(**inputs).sample).abs().max() > 0.01
    torch.testing.assert_close(out(model, inputs, image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vectors", [True, False])
def test_a_file_comes_back(vectors: bool, tmp_path: Path) -> None:
    base, inputs = unet()
    model, injection = adapted(base, vectors=vectors)
    injection.save(tmp_path, format="control_lora")
    again, image = deepcopy(base), torch.randn(2, 1, 64, 64)
    loaded = peftcore.load(again, tmp_path)
    assert loaded.config == injection.config
    torch.testing.assert_close(out(again, inputs, image), out(model, inputs, image), atol=1e-5, rtol=1e-5)
    held = load_file(tmp_path / "control_lora.safetensors")
    (network,) = injection.shared.values()
    if vectors:  # whole
        bias = base.conv_in.bias + network.get_submodule("conv_in").bias
        torch.testing.assert_close(held["input_blocks.0.0.bias"], bias.detach())
    assert ("input_blocks.0.0.bias" in held) is vectors
    half = {name: value.half() for name, value in held.items()}  # and without the dimensions of kernels
    half |= {name: value.flatten(1) for name, value in half.items() if name.endswith(".up")}
    save_file(half, tmp_path / "control_lora.safetensors")
    again = deepcopy(base)
    peftcore.load(again, tmp_path)
    torch.testing.assert_close(out(again, inputs, image), out(model, inputs, image), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("vectors", "verdict"), [(True, "dropped"), (False, "read")])
def test_what_other_programs_read(vectors: bool, verdict: str, tmp_path: Path) -> None:
    """ComfyUI all of it (its own code gave the same numbers: docs/generate/readers_in_programs.py); diffusers no biases
    of layers with updates."""
    base, _ = unet()
    _, injection = adapted(base, vectors=vectors)
    injection.save(tmp_path / "a.safetensors", format="control_lora")
    report = check(tmp_path / "a.safetensors", reader_named("diffusers"))
    assert check(tmp_path / "a.safetensors", reader_named("comfyui")).as_trained and report.verdict == verdict
    lost = {name for row in report.rows if row.verdict == "dropped" for name in row.tensors}
    (network,) = injection.shared.values()
    layers = [each for each in network.modules() if isinstance(each, BorrowedLayer) and each.bias is not None]
    assert len(lost) == len(layers) and all(name.endswith(".bias") for name in lost) and bool(lost) is vectors
    assert export(injection, tmp_path / "comfyui", reader_named("comfyui")).how == "as it is"
    assert (tmp_path / "comfyui/control_lora.safetensors").exists()
    if vectors:
        with pytest.raises(ExportError, match="vectors=False"):
            export(injection, tmp_path / "diffusers", reader_named("diffusers"))
    else:
        assert export(injection, tmp_path / "diffusers", reader_named("diffusers")).how == "as it is"
    with pytest.raises(ExportError, match="controlnet_lora does not change weights"):
        export(injection, tmp_path / "vllm", reader_named("vllm"))


def test_the_layout_is_that_of_stabilitys_file() -> None:
    """control-lora-canny-rank128.safetensors has 1228 tensors, in 395,733,680 bytes with their names; its first layer
    has rank 4 (Kosinkadink/Dinkster, test_sdxl_control_lora_layout_and_plan_are_exact_and_torch_free)."""
    sizes = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "norm_num_groups": 32,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**{**SIZES, **XL, **sizes})
        network = diffusers.ControlNetModel.from_unet(model, load_weights_from_unet=False)
        peftcore.author.borrow(network, model, Tap(), dense_layer, 128)
    shapes = {theirs: wanted[-1] for _, theirs, _, wanted in named(network, model, ExportError)}
    assert len(shapes) + 1 == 1228
    assert shapes["input_blocks.0.0.down"] == (4, 4, 3, 3)
    assert shapes["input_blocks.0.0.up"] == (320, 4, 1, 1)
    assert shapes["label_emb.0.0.up"] == (1280, 128)
    assert shapes["input_hint_block.14.weight"] == (320, 256, 3, 3)
    names = 395_733_680 - 2 * sum(map(math.prod, shapes.values()))
    assert 100 * 1228 < names < 200 * 1228


def test_what_no_file_holds(tmp_path: Path) -> None:
    base, _ = unet()
    for options, match in (({"scale": 0.5}, "neither scale"), ({"target": ["mid_block"]}, "all blocks")):
        with pytest.raises(ExportError, match=match):
            adapted(base, **options)[1].save(tmp_path, format="control_lora")
    with pytest.raises(ExportError, match="not a single controlnet_lora"):
        peftcore.apply(deepcopy(base), "lora", target="all-linear").save(tmp_path, format="control_lora")
    assert not [*tmp_path.iterdir()]


def test_files_that_are_refused(tmp_path: Path) -> None:
    base, inputs = unet()
    _, injection = adapted(base)
    file = tmp_path / "control_lora.safetensors"
    injection.save(tmp_path, format="control_lora")
    with pytest.raises(HostMismatch, match="UNet"):
        peftcore.load(HOSTS["mlp"].build()[0], tmp_path)
    held, plain = load_file(file), base(**inputs).sample
    first = "input_blocks.0.0.down"
    for wrong, match in (
        ({name: each for name, each in held.items() if name != first}, f"missing {first}"),
        ({**held, "output_blocks.0.0.down": torch.ones(2, 2)}, r"unknown output_blocks\.0\.0\.down"),
        ({**held, first: held[first][..., :2].contiguous()}, f"{first} has shape"),
        ({name: each for name, each in held.items() if "hint" not in name}, "no network for the image"),
        ({**held, first: held[first] > 0}, f"{first} have no floating-point"),
    ):
        save_file(wrong, file)
        with pytest.raises(CheckpointError, match=match):
            peftcore.load(base, tmp_path)
        assert torch.equal(base(**inputs).sample, plain)
