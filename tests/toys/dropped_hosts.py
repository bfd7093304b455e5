"""Hosts in training mode that drop and scale outputs of branches, and how an adapted one is compared with a twin: with
the same draws, by outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import peftcore

Tensors = dict[str, Tensor]
Adapter = Callable[[Tensor, Tensors], Tensor]


def image_model(**options: Any) -> nn.Module:
    """A ViT of timm with dropout, layer scale of 0.01 and stochastic depth, and with other options of its class."""
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    drops = {"proj_drop_rate": 0.2, "drop_path_rate": 0.4, "init_values": 0.01}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, **drops, **options).double()
    assert model.blocks[1].drop_path2.drop_prob > 0.3
    return model.requires_grad_(False).train()


def train(model: nn.Module, p: float = 0.3) -> nn.Module:
    """A host in training mode, each of its own dropouts with this probability."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ".peft." not in path:
            module.p = p
    return model.train()


def filled(injection: peftcore.Injection) -> dict[str, Tensors]:
    """The tensors of each operator, filled from N(0, 0.1), as copies that train."""
    generator, copies = torch.Generator().manual_seed(1), {}
    for path, operator in injection.operators.items():
        for parameter in operator.parameters():
            parameter.data.normal_(0, 0.1, generator=generator)
        copies[path] = {key: p.detach().clone().requires_grad_() for key, p in operator.named_parameters()}
    return copies


def rewrite(model: nn.Module, forward: Callable[..., Tensor], adapters: dict[str, list[Any]]) -> None:
    """Let blocks, by path, run `forward(block, x, *adapters)` in place of their own."""
    for path, each in adapters.items():
        block = model.get_submodule(path)
        block.forward = MethodType(lambda self, x, *rest, each=each, **kwargs: forward(self, x, *each), block)


def seeded(models: list[nn.Module], run: Callable[[nn.Module], Tensor]) -> Iterator[Tensor]:
    for model in models:
        torch.manual_seed(3)
        yield run(model)


def assert_same(
    injection: peftcore.Injection,
    copies: dict[str, Tensors],
    models: tuple[nn.Module, nn.Module],
    run: Callable[[nn.Module], Tensor],
    bare: nn.Module,
) -> None:
    """The adapted model and its twin return the same and have the same gradients; both are far from the bare one."""
    ours, expected, unchanged = seeded([*models, bare], run)
    assert (expected - unchanged).norm() > 1e-2 * unchanged.norm()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=ours.dtype)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for path, tensors in copies.items():
        for key, p in injection.operators[path].named_parameters():
            assert tensors[key].grad is not None and tensors[key].grad.abs().max() > 0, (path, key)
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-10)
