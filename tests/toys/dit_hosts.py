"""Tiny transformers of diffusers in float64, made from configurations: SD3, Flux, PixArt, DiT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZES = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
PATCHES = {"in_channels": 2, "sample_size": 8, "patch_size": 2}
WORDS, POOLED = 10, 6
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": (
        "SD3Transformer2DModel",
        {
            "joint_attention_dim": WORDS,
            "caption_projection_dim": 16,
            "pooled_projection_dim": POOLED,
            "out_channels": 2,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
            **PATCHES,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 1,
            "num_single_layers": 2,
            "joint_attention_dim": WORDS,
            "pooled_projection_dim": POOLED,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            "out_channels": 4,
            "cross_attention_dim": 16,
            "caption_channels": WORDS,
            "norm_type": "ada_norm_single",
            **PATCHES,
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        {
            "out_channels": 4,
            "num_embeds_ada_norm": 10,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            **PATCHES,
        },
    ),
}
NAMES = tuple(SHAPES)
IMAGE, TEXT, ROTARY = "hidden_states", "encoder_hidden_states", "image_rotary_emb"


def dit_host(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Any]]:
    """A seeded host in evaluation mode, in which all that modulates lets something through, and its inputs."""
    diffusers = pytest.importorskip("diffusers")
    kind, sizes = SHAPES[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, kind)(**SIZES, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for path, module in model.named_modules():
        if path.endswith("class_embedder"):
            module.dropout_prob = 0.0  # type: ignore[assignment]  # labels left out at random are training's noise
    return model.to(dtype).eval().requires_grad_(False), inputs_of(name, dtype)


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Inputs of a host: two images of 4 x 4 tokens, with 3 tokens of text where it reads one."""
    picture = torch.randn(2, 2, 8, 8, dtype=dtype)
    text = {"encoder_hidden_states": torch.randn(2, 3, WORDS, dtype=dtype)}
    pooled = {"pooled_projections": torch.randn(2, POOLED, dtype=dtype)}
    steps = {"timestep": torch.tensor([3, 5])}
    if name == "sd3":
        return {"hidden_states": picture, **text, **pooled, **steps}
    if name == "pixart":
        added = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return {"hidden_states": picture, **text, **steps, **added}
    if name == "dit":
        return {"hidden_states": picture, **steps, "class_labels": torch.tensor([1, 2])}
    return {
        "hidden_states": torch.randn(2, 16, 4, dtype=dtype),
        **text,
        **pooled,
        "timestep": torch.tensor([0.3, 0.5], dtype=dtype),
        "img_ids": grid(4, 4).to(dtype),
        "txt_ids": torch.zeros(3, 3, dtype=dtype),
        "guidance": torch.full((2,), 2.5, dtype=dtype),
    }


def grid(height: int, width: int) -> Tensor:
    """The places of an image's tokens, as Flux has them: ``[height * width, 3]``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)


def blocks_of(model: Any) -> list[nn.Module]:
    """The blocks in the order in which they run."""
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


@contextmanager
def joined(
    model: Any, rows: Mapping[int, Tensor], angles: tuple[Tensor, Tensor] | None = None, beside_text: bool = False
) -> Iterator[None]:
    """Rows stand in the sequence itself: behind the image, or in front of the text. By number of a block those that
    come in there, where the former ones leave; all leave behind the last block. Their rotary angles are zero, or given.
    """
    blocks = blocks_of(model)
    count = next(iter(rows.values())).shape[-2]
    leaving = {len(blocks) - 1, *(number - 1 for number in rows if number > min(rows))}
    stream = TEXT if beside_text else IMAGE

    def put(number: int, tokens: Tensor) -> Tensor:
        own = rows[number].expand(len(tokens), -1, -1)
        return torch.cat([own, tokens] if beside_text else [tokens, own], 1)

    def before(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number in rows and stream == IMAGE and args:
            args = (put(number, args[0]), *args[1:])
        elif number in rows:
            kwargs = {**kwargs, stream: put(number, kwargs[stream])}
        if kwargs.get(ROTARY) is not None:
            cos, sin = kwargs[ROTARY]
            ones = cos.new_ones(count, cos.shape[1])
            parts = zip((cos, sin), (ones, 0 * ones) if angles is None else angles, strict=True)
            kwargs = {**kwargs, ROTARY: tuple(torch.cat(each[::-1] if beside_text else each) for each in parts)}
        return args, kwargs

    def behind(output: Any) -> Any:
        if isinstance(output, Tensor):
            return output[:, :-count]
        text, image = output
        if not beside_text:
            return text, image[:, :-count]
        return (None if text is None else text[:, count:]), image

    removed = []
    for number, block in enumerate(blocks):
        removed.append(block.register_forward_pre_hook(lambda _, *given, n=number: before(n, *given), with_kwargs=True))
        if number in leaving:
            removed.append(block.register_forward_hook(lambda _, args, output: behind(output)))
    try:
        yield
    finally:
        for each in removed:
            each.remove()
