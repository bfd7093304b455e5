"""Tiny hosts of timm and diffusers whose attention is torch's function, and the edits of `attention_hosts` in it,
written a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host_zoo import build
from torch import Tensor

NAMES = (
    "timm_vit",
    "timm_vit_qknorm_ls",
    "timm_eva02",
    "timm_swin",
    "timm_beit",
    "sd15_unet",
    "sdxl_unet",
    "sd3",
    "flux",
    "pixart",
)


def host(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Any]]:
    """A seeded host in evaluation mode with weights large enough that attention matters, and its inputs."""
    pytest.importorskip("timm" if name.startswith("timm") else "diffusers")
    model, given = build(name)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    inputs = {key: _to(value, dtype) for key, value in given.items()}
    return model.to(dtype).eval().requires_grad_(False), inputs


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _to(each, dtype) for key, each in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def logits(model: Any, given: Mapping[str, Any]) -> Tensor:
    """The host's output."""
    output = model(*given.values()) if list(given) == ["x"] else model(**given)
    found: Tensor = output if isinstance(output, Tensor) else output.sample
    return found


@contextmanager
def rewritten(model: Any, tensors: Mapping[str, dict[str, Tensor]]) -> Iterator[None]:
    """The host computes the edited attentions by the equations here; torch's function is replaced meanwhile."""
    now: list[dict[str, Tensor]] = []
    removed = []
    for path, own in tensors.items():
        module = model.get_submodule(path)
        removed.append(module.register_forward_pre_hook(lambda *_, own=own: now.append(own)))
        removed.append(module.register_forward_hook(lambda *_: now.pop() and None))
        if "fused_attn" in vars(module):
            module.fused_attn = True
    before = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **options: Any) -> Tensor:
        own = now[-1] if now else {}
        scale = query.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
        if "by" in own:
            query = query + own["by"]
        scores = scale * torch.einsum("bhqd,bhkd->bhqk", query, key)
        if attn_mask is not None:
            scores = scores + attn_mask
        if "value" in own:
            front = scale * torch.einsum("bhqd,hkd->bhqk", query, own["key"])
            exps, fronts = scores.exp(), front.exp()
            total = exps.sum(-1, keepdim=True) + fronts.sum(-1, keepdim=True)
            words = torch.einsum("bhqk,bhkd->bhqd", exps / total, value)
            return words + torch.einsum("bhqk,hkd->bhqd", fronts / total, own["value"])
        exps = scores.exp()
        return torch.einsum("bhqk,bhkd->bhqd", exps / exps.sum(-1, keepdim=True), value)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
        for each in removed:
            each.remove()


VALUES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "timm_vit": lambda module, x: module.qkv(x).chunk(3, -1)[2],
    "sd15_unet": lambda module, x: module.to_v(x),
}
"""The values that an attention makes of given inputs, by host."""
