"""Names of tensors in files of kohya, LyCORIS and ComfyUI."""

import pytest

from peftcore.files.formats.kohya_names import PARTS, KohyaTensorName, are_known, part_of, stem_of, understood

DOWN, UP = "lora_down.weight", "lora_up.weight"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"lora_unet_a_b.{DOWN}", KohyaTensorName("lora_unet", "lora_unet_a_b", "a.b", DOWN)),
        ("lora_te1_a.alpha", KohyaTensorName("lora_te1", "lora_te1_a", "a", "alpha")),
        (
            f"diffusion_model.a_b.0.qkv.{UP}",
            KohyaTensorName("diffusion_model", "diffusion_model.a_b.0.qkv", "a.b.0.qkv", UP),
        ),
        ("diffusion_model.a.lora_A.weight", KohyaTensorName("diffusion_model", "diffusion_model.a", "a", DOWN)),
        ("diffusion_model.a.lora_B.default.weight", KohyaTensorName("diffusion_model", "diffusion_model.a", "a", UP)),
        ("diffusion_model.a.diff_b", KohyaTensorName("diffusion_model", "diffusion_model.a", "a", "diff_b")),
        ("diffusion_model.a.lora_B.bias", KohyaTensorName("diffusion_model", "diffusion_model.a", "a", "lora_B.bias")),
        ("base_model.model.a.lora_B.weight", KohyaTensorName("base_model.model", "base_model.model.a", "a", UP)),
        (
            "a.processor.qkv_lora1.down.weight",
            KohyaTensorName("", "a.processor.qkv_lora1", "a.processor.qkv.lora1", DOWN),
        ),
        (f"a.0.to_q.{DOWN}", KohyaTensorName("", "a.0.to_q", "a.0.to.q", DOWN)),
        ("weight", KohyaTensorName("", "", "", "weight")),
    ],
)
def test_names_taken_apart(name: str, expected: KohyaTensorName) -> None:
    assert understood(name, part_of(name) or "") == expected


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("lycoris_a.diff", True),
        (f"a.to_q.{DOWN}", True),
        ("single_blocks.11.linear1.lora_A.weight", True),
        ("base_model.model.single_blocks.1.linear1.lora_A.weight", True),
        ("base_model.model.layers.1.q.lora_A.weight", False),
        ("transformer_blocks.0.attn.to_q.lora_A.weight", False),
        (f"a.{DOWN}", False),
        ("my_single_blocks.weight", False),
    ],
)
def test_files_that_are_known(name: str, known: bool) -> None:
    assert are_known([name]) is known


def test_stems_are_what_names_are_taken_apart_from() -> None:
    for part in (*PARTS, "diffusion_model"):
        name = f"{stem_of(part, 'double_blocks.0.qkv')}.{UP}"
        said = understood(name, part)
        assert part_of(name) == part
        assert (said.stem, said.path, said.leaf) == (stem_of(part, "double_blocks.0.qkv"), "double.blocks.0.qkv", UP)
