"""Names of modules in the original code of Flux, Wan and Stable Diffusion, which files of LoRA use.

Several modules of diffusers can be one module of the original code, whose outputs are concatenated: ``to_q``, ``to_k``
and ``to_v`` of Flux are ``img_attn.qkv`` in double blocks. In single blocks, these three and ``proj_mlp`` are
``linear1``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from peftcore.files.formats.ldm_names import ldm_names


@dataclass(frozen=True)
class OriginalModule:
    """A module of the original code, described by the corresponding modules of the host."""

    paths: tuple[str, ...]
    """The host's modules; the original module's output is the concatenation of their outputs in this order."""
    swapped: bool = False
    """True if the host has the two halves of the outputs, shift and scale, in the opposite order."""

    @property
    def whole(self) -> bool:
        """True if the original module is exactly one module of the host."""
        return len(self.paths) == 1 and not self.swapped


Names = Mapping[str, str]
"""Maps original names to the host's names. If one original module is several modules of the host, their names are
separated by spaces. A ``~`` in front means that the two halves of the outputs are swapped."""
IMAGE, TEXT = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
FLUX_DOUBLE: Names = {
    "img_attn.qkv": IMAGE,
    "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.qkv": TEXT,
    "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
FLUX_SINGLE: Names = {
    "linear1": f"{IMAGE} proj_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
FLUX_AROUND: Names = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
}
XLABS_DOUBLE: Names = {
    "processor.qkv_lora1": IMAGE,
    "processor.qkv_lora2": TEXT,
    "processor.proj_lora1": "attn.to_out.0",
    "processor.proj_lora2": "attn.to_add_out",
}
XLABS_SINGLE: Names = {"processor.qkv_lora": IMAGE, "processor.proj_lora": "proj_out"}
WAN_BLOCK: Names = {
    **{f"self_attn.{name}": f"attn1.to_{name}" for name in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    **{f"cross_attn.{name}": f"attn2.to_{name}" for name in "qkv"},
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm2": "norm3",
    "norm3": "norm2",
}
WAN_AROUND: Names = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
FLUX = {"time_text_embed.text_embedder.linear_1", "time_text_embed.timestep_embedder.linear_1", "norm_out.linear"}
FLUX_BLOCKS = "transformer_blocks.0.norm1_context.linear", "single_transformer_blocks.0.proj_mlp"
"""Paths by which Flux is recognized: it has at least one of them, and its `x_embedder` is a single layer."""
WAN = {"blocks.0.attn1.to_q", "blocks.0.attn2.to_q", "blocks.0.ffn.net.0.proj", "condition_embedder.time_proj"}
QWEN_IMAGE = {"transformer_blocks.0.img_mod.1", "transformer_blocks.0.attn.add_q_proj", "txt_norm", "norm_out.linear"}
"""Paths by which Qwen-Image is recognized."""


def original_names(paths: Collection[str]) -> dict[str, OriginalModule]:
    """Returns the modules of the original code, keyed by name, for a host whose modules have these paths. Names that
    are used for writing are first. Empty if the original code is unknown, or has the same names as the host."""
    if _is_flux(paths):
        double, single = ("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks")
        found = [
            *_in_blocks(double, FLUX_DOUBLE, paths),
            *_in_blocks(single, FLUX_SINGLE, paths),
            *_within("", "", FLUX_AROUND, paths),
            *_in_blocks(double, XLABS_DOUBLE, paths),
            *_in_blocks(single, XLABS_SINGLE, paths),
        ]
    elif set(paths) >= WAN:
        found = [*_in_blocks(("blocks", "blocks"), WAN_BLOCK, paths), *_within("", "", WAN_AROUND, paths)]
    else:
        found = [(name, OriginalModule((path,))) for name, path in ldm_names(paths).items()]
    return dict(found)


def is_transformer(paths: Collection[str]) -> bool:
    """True if a host is a transformer of diffusers whose original names are known: Flux, Wan, or Qwen-Image, whose
    original names are the host's own."""
    return _is_flux(paths) or set(paths) >= WAN or set(paths) >= QWEN_IMAGE


def _is_flux(paths: Collection[str]) -> bool:
    inside = any(path.startswith(("x_embedder.", "context_embedder.")) for path in paths)
    return set(paths) >= FLUX and any(block in paths for block in FLUX_BLOCKS) and not inside


def written_names(names: Mapping[str, OriginalModule]) -> dict[str, str]:
    """Returns the original name for each path of the host; the first if there are several."""
    found: dict[str, str] = {}
    for name, original in names.items():
        for path in original.paths:
            found.setdefault(path, name)
    return found


def _in_blocks(lists: tuple[str, str], names: Names, paths: Collection[str]) -> Iterator[tuple[str, OriginalModule]]:
    """Yields the original names in all blocks. `lists` are the names of the list of blocks: in the original code, and
    on the host."""
    theirs, here = lists
    for index in count():
        if f"{here}.{index}" not in paths:
            return
        yield from _within(f"{theirs}.{index}.", f"{here}.{index}.", names, paths)


def _within(theirs: str, here: str, names: Names, paths: Collection[str]) -> Iterator[tuple[str, OriginalModule]]:
    """Yields the original modules whose corresponding modules all exist on the host."""
    for name, modules in names.items():
        found = tuple(here + path.lstrip("~") for path in modules.split())
        if all(path in paths for path in found):
            yield theirs + name, OriginalModule(found, modules.startswith("~"))
