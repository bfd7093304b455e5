"""Names of the original code of Flux, Wan and Qwen-Image."""

import pytest
import torch
from original_files import MODELS

from peftcore.files.formats.original_names import OriginalModule, is_transformer, original_names, written_names


def paths(name: str) -> list[str]:
    with torch.device("meta"):
        model, _ = MODELS[name].build()
    return [path for path, _ in model.named_modules()]


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("flux", "double_blocks.1.img_attn.qkv", [f"transformer_blocks.1.attn.to_{each}" for each in "qkv"]),
        ("flux", "double_blocks.0.txt_attn.proj", ["transformer_blocks.0.attn.to_add_out"]),
        (
            "flux",
            "single_blocks.1.linear1",
            [f"single_transformer_blocks.1.{each}" for each in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
        ),
        ("flux", "final_layer.linear", ["proj_out"]),
        ("flux", "guidance_in.in_layer", ["time_text_embed.guidance_embedder.linear_1"]),
        ("wan", "blocks.1.cross_attn.o", ["blocks.1.attn2.to_out.0"]),
        ("wan", "blocks.0.norm3", ["blocks.0.norm2"]),
        ("wan", "head.head", ["proj_out"]),
        ("wan_from_images", "blocks.0.cross_attn.k_img", ["blocks.0.attn2.add_k_proj"]),
        ("wan_from_images", "img_emb.proj.3", ["condition_embedder.image_embedder.ff.net.2"]),
    ],
)
def test_names(model: str, name: str, expected: list[str]) -> None:
    assert original_names(paths(model))[name] == OriginalModule(tuple(expected))


def test_what_is_not_there_has_no_name() -> None:
    assert "blocks.0.cross_attn.k_img" not in original_names(paths("wan"))
    assert original_names(paths("qwen_image")) == {} == original_names(["transformer_blocks.0.attn.to_q"])


def test_halves_of_the_last_modulation_are_swapped() -> None:
    swapped = {name for name, each in original_names(paths("flux")).items() if each.swapped}
    assert swapped == {"final_layer.adaLN_modulation.1"}


def test_every_layer_of_a_model_is_written_by_one_name() -> None:
    """That of the original code, and not that of XLabs."""
    for model in ("flux", "wan_from_images"):
        here = paths(model)
        names = original_names(here)
        written = written_names(names)
        assert not any("processor" in name for name in written.values())
        assert all(path in names[name].paths for path, name in written.items())
        layers = [path for path in here if path.endswith((".linear", "to_q", "to_k", "to_v", "to_out.0", "proj_mlp"))]
        assert layers and set(layers) <= written.keys()


def test_hosts_that_are_known() -> None:
    assert all(map(is_transformer, map(paths, MODELS)))
    assert not is_transformer(["down_blocks.0", "transformer_blocks.0.attn.to_q"])
    assert not is_transformer([*paths("flux"), "x_embedder.proj"])  # Hunyuan's, with its own names
