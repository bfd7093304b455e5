"""Names of a UNet's modules in the original code of Stable Diffusion, which files for SDXL use.

In that code, the down blocks are one list, ``input_blocks``, in which every resnet (with the attention after it) and
every downsampler is a separate entry. In the list of up blocks, ``output_blocks``, the upsampler belongs to the last
entry of its block.
"""

from __future__ import annotations

from collections.abc import Collection

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
AROUND = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_names(paths: Collection[str]) -> dict[str, str]:
    """Returns the paths of a UNet's modules, keyed by their names in the original code; empty for hosts that are not
    UNets."""
    if "up_blocks.0.resnets.0" not in paths:
        return {}
    blocks = dict(AROUND)
    index = 1
    for block in _list("down_blocks", paths):
        for layer, resnet in enumerate(_list(f"{block}.resnets", paths)):
            blocks[resnet] = f"input_blocks.{index}.0"
            blocks[f"{block}.attentions.{layer}"] = f"input_blocks.{index}.1"
            index += 1
        if f"{block}.downsamplers.0" in paths:
            blocks[f"{block}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    index = 0
    for block in _list("up_blocks", paths):
        for layer, resnet in enumerate(_list(f"{block}.resnets", paths)):
            blocks[resnet] = f"output_blocks.{index}.0"
            blocks[f"{block}.attentions.{layer}"] = f"output_blocks.{index}.1"
            index += 1
        behind = 2 if f"{block}.attentions.0" in paths else 1
        blocks[f"{block}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{behind}.conv"
    found = {}
    for path in paths:
        steps = path.split(".")
        for count in range(len(steps), 0, -1):
            start = ".".join(steps[:count])
            if start in blocks:
                rest = steps[count:]
                if rest and "resnets" in steps:
                    rest[0] = RESNET.get(rest[0], rest[0])
                found[".".join([blocks[start], *rest])] = path
                break
    return found


def _list(path: str, paths: Collection[str]) -> list[str]:
    """Returns the paths of the entries of a module list."""
    found: list[str] = []
    while f"{path}.{len(found)}" in paths:
        found.append(f"{path}.{len(found)}")
    return found
