"""Vision transformers that visual prompts go through, and the equations of VPT written a second time: the prompt behind
the class tokens, as the authors place it, and the host's own parts called one after the other."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.testing.hosts import stir
from peftcore.testing.kit import fill
from peftcore_vision._prompts import PromptOperator

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

Edit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of keys and values ``[batch, heads, tokens, width]``."""
TIMM = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 1.5, "num_classes": 3}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}
TEXT = {
    **{key: TOWER[key] for key in ("intermediate_size", "num_hidden_layers", "num_attention_heads")},
    "hidden_size": 32,  # the larger tower
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Images:
    """A host, and its parts: what embeds an image, its blocks, what makes the output of the last block's tokens."""

    build: Callable[[], nn.Module]
    blocks: str
    embed: Callable[[Any, Tensor], Tensor]
    finish: Callable[[Any, Tensor], Tensor]
    classes: int = 1
    run: Callable[[Any, Tensor], Tensor] = lambda model, pixels: model(pixels)


def _timm(**options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.models.VisionTransformer(**{**TIMM, **options})


def _embed_timm(model: Any, pixels: Tensor) -> Tensor:
    return model.norm_pre(model._pos_embed(model.patch_embed(pixels)))


def _embed_torchvision(model: Any, pixels: Tensor) -> Tensor:
    x = model._process_input(pixels)
    return torch.cat([model.class_token.expand(len(x), -1, -1), x], 1) + model.encoder.pos_embedding


HOSTS = {
    "vit": Images(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TOWER, num_labels=3)),
        "vit.layers",
        lambda model, pixels: model.vit.embeddings(pixels),
        lambda model, x: model.classifier(model.vit.layernorm(x)[:, 0]),
        run=lambda model, pixels: model(pixels).logits,
    ),
    "clip": Images(
        lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=TOWER)),
        "vision_model.encoder.layers",
        lambda model, pixels: model.vision_model.pre_layrnorm(model.vision_model.embeddings(pixels)),
        lambda model, x: model.visual_projection(model.vision_model.post_layernorm(x[:, 0])),
        run=lambda model, pixels: model.get_image_features(pixels).pooler_output,
    ),
    "siglip": Images(
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER)),
        "encoder.layers",
        lambda model, pixels: model.embeddings(pixels),
        lambda model, x: model.head(model.post_layernorm(x)),
        classes=0,
        run=lambda model, pixels: model(pixels).pooler_output,
    ),
    "timm": Images(_timm(), "blocks", _embed_timm, lambda model, x: model.head(model.norm(x)[:, 0])),
    "timm_mean": Images(
        _timm(global_pool="avg", reg_tokens=2, class_token=False),
        "blocks",
        _embed_timm,
        lambda model, x: model.head(model.fc_norm(x[:, 2:].mean(1))),
        classes=2,
    ),
    "timm_distilled": Images(
        lambda: timm.models.deit.VisionTransformerDistilled(**TIMM),
        "blocks",
        _embed_timm,
        lambda model, x: (model.head(model.norm(x)[:, 0]) + model.head_dist(model.norm(x)[:, 1])) / 2,
        classes=2,
    ),
    "torchvision": Images(
        lambda: torchvision.models.VisionTransformer(8, 4, 3, 2, 16, 24, num_classes=3),
        "encoder.layers",
        _embed_torchvision,
        lambda model, x: model.heads(model.encoder.ln(x)[:, 0]),
    ),
}


def host(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = HOSTS[name].build()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return stir(model).double().eval().requires_grad_(False)


def pixels() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def prompted(model: nn.Module, method: str, **options: Any) -> tuple[peftcore.Injection, list[Tensor]]:
    """Apply without the head, and move every tensor by N(0, 0.1)."""
    options = {"length": 4, "dtype": "float64", "train_head": False, **options}
    injection = peftcore.apply(model, method, **options)
    fill(injection)
    return injection, [each.prompt for each in injection.operators.values() if isinstance(each, PromptOperator)]


def by_hand(name: str, model: Any, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """The output with one prompt before the first block, or one before each."""
    parts, k, n = HOSTS[name], HOSTS[name].classes, len(prompts[0])
    x = parts.embed(model, images)
    x = torch.cat([x[:, :k], prompts[0].expand(len(x), -1, -1), x[:, k:]], 1)
    for number, block in enumerate(model.get_submodule(parts.blocks)):
        if 0 < number < len(prompts):
            x = torch.cat([x[:, :k], prompts[number].expand(len(x), -1, -1), x[:, k + n :]], 1)
        x = block(x, None) if name in ("clip", "siglip") else block(x)
    return parts.finish(model, torch.cat([x[:, :k], x[:, k + n :]], 1))


def compare(name: str, model: nn.Module, prompts: Sequence[Tensor]) -> None:
    """Outputs and gradients of a host with prompts, and of the equation on a fresh host with copies of them."""
    base, images = host(name), pixels()
    copies = [prompt.detach().clone().requires_grad_() for prompt in prompts]
    plain, ours, expected = (
        HOSTS[name].run(base, images),
        HOSTS[name].run(model, images),
        by_hand(name, base, images, copies),
    )
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for prompt, copy in zip(prompts, copies, strict=True):
        assert copy.grad is not None and copy.grad.abs().max() > 1e-4
        torch.testing.assert_close(prompt.grad, copy.grad, rtol=1e-8, atol=1e-9)


def _by_softmax(module: Any, edit: Edit, matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    """An attention over tokens ``[batch, tokens, d]`` from its matrices, with keys and values that went through an
    edit."""
    weight, bias, out_weight, out_bias = matrices
    q, k, v = (
        (x @ w.T + b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True)
    )
    k, v = edit(k, v)
    shares = torch.einsum("bhqd,bhkd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", shares, v).flatten(2) @ out_weight.T + out_bias


def _timm_attention(module: Any, edit: Edit, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return _by_softmax(module, edit, [*module.qkv.parameters(), *module.proj.parameters()], x)


def _torch_attention(module: Any, edit: Edit, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    matrices = [module.in_proj_weight, module.in_proj_bias, *module.out_proj.parameters()]
    return _by_softmax(module, edit, matrices, x), None


ATTENTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "timm": ("attn", _timm_attention),
    "torchvision": ("self_attention", _torch_attention),
}
"""Where blocks of hosts have their attention, and its equation."""


def edit_attention(name: str, base: nn.Module, edits: Sequence[Edit]) -> None:
    """Let each block's attention be its equation, with an edit of its keys and values."""
    leaf, equation = ATTENTIONS[name]
    for block, edit in zip(base.get_submodule(HOSTS[name].blocks), edits, strict=True):
        module = getattr(block, leaf)
        module.forward = functools.partial(equation, module, edit)


def wave(shape: Sequence[int], key: str) -> Tensor:
    """Numbers that depend on a name alone."""
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


@torch.no_grad()
def of_waves(method: str, **options: Any) -> tuple[nn.Module, peftcore.Injection]:
    """A host of such numbers with such prompts; the authors' classes were run on the same."""
    model = timm.models.VisionTransformer(**TIMM).double().eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(wave(parameter.shape, name))
    injection, prompts = prompted(model, method, **options)
    for number, prompt in enumerate(prompts):
        prompt.copy_(wave(prompt.shape, f"prompt.{number}"))
    for shared in injection.shared.values():
        for name, parameter in shared.named_parameters():
            parameter.copy_(wave(parameter.shape, f"projection.{name}"))
    return model, injection


@torch.no_grad()
def authors_numbers(method: str, projection: int | None) -> Tensor:
    """What such a host gives for such images."""
    model, _ = of_waves(method, length=2, projection=projection)
    result: Tensor = model(wave((2, 3, 8, 8), "images"))
    return result
