"""Gradient checkpointing as hosts themselves have it, of both kinds: gradients equal to the plain run, to the bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_hosts import host

import peftcore
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

METHODS = ("lora", "dora", "ia3", "houlsby_adapter", "bitfit", "adalora")
TEXT = ("llama", "bert", "gpt2", "t5")
ROUNDED = 5e-6
"""Of the largest gradient: what `test_the_bare_t5_rounds_otherwise_in_the_reentrant_kind` finds without an adapter."""
OPTIONS: dict[str, dict[str, Any]] = {"bitfit": {"add_missing_bias": True}}


def gradients(model: nn.Module, method: str, run: Callable[[nn.Module], Tensor]) -> tuple[list[Tensor], Tensor]:
    """Of every operator tensor, with dropout at work, and the output."""
    injection = peftcore.apply(model, method, seed=0, **OPTIONS.get(method, {}))
    fill(injection)
    model.train()
    torch.manual_seed(3)
    output = run(model)
    weights = torch.linspace(-1.0, 1.5, output.numel()).view_as(output)
    (output * weights).sum().backward()
    found = [parameter.grad for parameter in injection.parameters()]
    assert all(gradient is not None and gradient.any() for gradient in found)
    return found, output.detach()


def assert_same(
    plain: tuple[list[Tensor], Tensor], checkpointed: tuple[list[Tensor], Tensor], tolerance: float = 0.0
) -> None:
    """Outputs to the bit; gradients too, or up to the rounding that the host alone shows."""
    assert torch.equal(plain[1], checkpointed[1])
    largest = max(one.abs().max() for one in plain[0])
    for one, other in zip(plain[0], checkpointed[0], strict=True):
        assert (one - other).abs().max() <= tolerance * largest


def recomputed(model: nn.Module) -> list[str]:
    """Fills with the names of modules that run during backward."""
    seen: list[str] = []
    for name, module in model.named_modules():

        def note(module: nn.Module, args: Any, name: str = name) -> None:
            if torch._C._current_graph_task_id() != -1:
                seen.append(name)

        module.register_forward_pre_hook(note)
    return seen


@pytest.mark.share(3)
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TEXT)
def test_text_models_of_transformers(name: str, method: str, reentrant: bool) -> None:
    _, inputs = HOSTS[name].build()

    def run(model: nn.Module) -> Tensor:
        return model(**inputs).logits

    plain = gradients(host(name), method, run)
    model = host(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # that kind drops the gradients of layers whose inputs need none
    seen = recomputed(model)
    assert_same(plain, gradients(model, method, run), ROUNDED if (name, reentrant) == ("t5", True) else 0.0)
    assert seen, "nothing was computed again"


def test_the_bare_t5_rounds_otherwise_in_the_reentrant_kind() -> None:
    """Its layers share a position bias and the encoder's output, whose gradients are then summed in another order."""
    _, inputs = HOSTS["t5"].build()
    found = []
    for reentrant in (None, True):
        model = host("t5").train()
        if reentrant:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(**inputs).logits.square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    errors = [((one - other).abs().max() / one.abs().max()).item() for one, other in zip(*found, strict=True)]
    assert 0.0 < max(errors) < ROUNDED


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("method", METHODS)
def test_image_models_of_transformers(method: str, reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")

    def build() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        config = transformers.ViTConfig(image_size=8, patch_size=4, initializer_range=0.3, **sizes)
        return transformers.ViTForImageClassification(config)

    pixels = torch.randn(2, 3, 8, 8)
    plain = gradients(build(), method, lambda model: model(pixel_values=pixels).logits)
    model = build()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    given = pixels.clone().requires_grad_(reentrant)
    seen = recomputed(model)
    assert_same(plain, gradients(model, method, lambda model: model(pixel_values=given).logits))
    assert seen, "nothing was computed again"


@pytest.fixture
def reentrancy() -> Iterator[Callable[[bool], None]]:
    """timm has one setting for the process."""
    layers = pytest.importorskip("timm.layers")
    before = layers.use_reentrant_ckpt()
    yield layers.set_reentrant_ckpt
    layers.set_reentrant_ckpt(before)


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("method", METHODS)
def test_image_models_of_timm(method: str, reentrant: bool, reentrancy: Callable[[bool], None]) -> None:
    timm = pytest.importorskip("timm")

    def build() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        model = timm.models.VisionTransformer(**sizes, num_classes=3, drop_path_rate=0.2, proj_drop_rate=0.1)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    pixels = torch.randn(2, 3, 8, 8)
    plain = gradients(build(), method, lambda model: model(pixels))
    reentrancy(reentrant)
    model = build()
    model.set_grad_checkpointing()
    given = pixels.clone().requires_grad_(reentrant)
    seen = recomputed(model)
    assert_same(plain, gradients(model, method, lambda model: model(given)))
    assert seen, "nothing was computed again"
