"""Names of the original code of Stable Diffusion."""

from peftcore.files.formats.ldm_names import ldm_names


def test_original_names_count_entries_of_the_lists() -> None:
    paths = {f"down_blocks.{b}.resnets.{r}" for b in range(2) for r in range(2)} | {"down_blocks.0", "down_blocks.1"}
    paths |= {"down_blocks.0.downsamplers.0", "down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.0.conv1"}
    paths |= {"up_blocks.0", "up_blocks.1", "up_blocks.0.resnets.0", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1"}
    paths |= {"up_blocks.0.upsamplers.0.conv", "up_blocks.1.resnets.1.conv_shortcut"}
    names = {path: name for name, path in ldm_names(paths).items()}
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert names["down_blocks.1.resnets.0.conv1"] == "input_blocks.4.0.in_layers.2"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.0.1.conv"
    assert names["up_blocks.1.resnets.1.conv_shortcut"] == "output_blocks.2.0.skip_connection"
    assert ldm_names({"a", "b.c"}) == {}
