"""CLIP-Adapter: the authors' class, the equation in models of images and texts, and classifiers in their place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vpt_equations import HOSTS, host, pixels, wave

import peftcore
from peftcore.errors import TargetError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "clip_adapter.json"
CODE: Any = {"repository": "gaopengcuhk/CLIP-Adapter", "commit": "08d07f8", "script": "clip_adapter.py"}
IDS = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0], [1, 8, 2, 0]])
WITH_HEADS = ("llama", "bert", "t5", "gpt2", "moe", "mistral", "vit", "convnet", "task")


@conformance(
    "clip_adapter",
    options={name: {"features": "input"} for name in WITH_HEADS},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def mixed(operator: nn.Module, f: Tensor, ratio: float = 0.2) -> Tensor:
    return ratio * ((f @ operator.down.weight.T).clamp(min=0) @ operator.up.weight.T).clamp(min=0) + (1 - ratio) * f


@against("authors", "clip_adapter", **CODE)
def test_the_authors_class_with_the_same_numbers() -> None:
    """Directions of the mixed features, and the gradients of both matrices."""
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in frozen(NUMBERS).items()}
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    nn.init.eye_(model[0].weight)
    operator = peftcore.apply(model, "clip_adapter", target="0", dtype="float64").operators["0"]
    with torch.no_grad():
        operator.down.weight.copy_(wave((2, 8), "down"))
        operator.up.weight.copy_(wave((8, 2), "up"))
    output = model(wave((3, 8), "features"))
    output = output / output.norm(dim=-1, keepdim=True)
    (output * wave((3, 8), "direction")).sum().backward()
    found = {"logits": output, "down": operator.down.weight.grad, "up": operator.up.weight.grad}
    for name, ours in found.items():
        torch.testing.assert_close(ours, numbers[name], rtol=1e-12, atol=1e-12)


def test_images_and_texts_are_compared_by_the_mixed_features() -> None:
    model, base = host("clip"), host("clip")
    injection = peftcore.apply(model, "clip_adapter", dtype="float64")
    fill(injection)
    assert list(injection.operators) == ["visual_projection"]
    image, text = HOSTS["clip"].run(base, pixels()), base.get_text_features(IDS).pooler_output
    f = mixed(injection.operators["visual_projection"], image)
    expected = base.logit_scale.exp() * (f / f.norm(dim=-1, keepdim=True)) @ (text / text.norm(dim=-1, keepdim=True)).T
    plain = base(input_ids=IDS, pixel_values=pixels()).logits_per_image
    ours = model(input_ids=IDS, pixel_values=pixels()).logits_per_image
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_texts_can_have_one_with_a_ratio_of_its_own() -> None:
    model, base = host("clip"), host("clip")
    both, ratios = ["visual_projection", "text_projection"], {"text_projection": {"ratio": 0.7}}
    injection = peftcore.apply(model, "clip_adapter", target=both, overrides=ratios, dtype="float64")
    fill(injection)
    expected = mixed(injection.operators["text_projection"], base.get_text_features(IDS).pooler_output, 0.7)
    torch.testing.assert_close(model.get_text_features(IDS).pooler_output, expected, rtol=1e-10, atol=1e-10)
    assert model.get_image_features(pixels()).pooler_output.shape == (2, 512)


def test_a_pooling_head_returns_features_too() -> None:
    model, base = host("siglip"), host("siglip")
    injection = peftcore.apply(model, "clip_adapter", target="head", dtype="float64")
    fill(injection)
    expected = mixed(injection.operators["head"], base(pixels()).pooler_output)
    torch.testing.assert_close(model(pixels()).pooler_output, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_a_classifier_is_given_the_mixed_features(name: str) -> None:
    model, base = host(name), host(name)
    injection = peftcore.apply(model, "clip_adapter", features="input", dtype="float64")
    fill(injection)
    ((path, operator),) = injection.operators.items()
    base.get_submodule(path).register_forward_pre_hook(lambda module, args: (mixed(operator, args[0]),))
    run = HOSTS[name].run
    torch.testing.assert_close(run(model, pixels()), run(base, pixels()), rtol=1e-10, atol=1e-10)
    assert (run(model, pixels()) - run(host(name), pixels())).abs().max() > 1e-3


def test_at_the_start_it_is_the_hosts_own_with_a_ratio_of_zero() -> None:
    model, plain = host("clip"), HOSTS["clip"].run(host("clip"), pixels())
    operator = peftcore.apply(model, "clip_adapter", dtype="float64").operators["visual_projection"]
    assert sum(p.numel() for p in operator.parameters()) == 2 * 512 * 128
    assert (HOSTS["clip"].run(model, pixels()) - plain).abs().max() > 1e-3
    operator.ratio = 0.0
    assert torch.equal(HOSTS["clip"].run(model, pixels()), plain)


def test_where_it_cannot_be() -> None:
    with pytest.raises(TargetError, match="no projection of images"):
        peftcore.apply(host("vit"), "clip_adapter")
    with pytest.raises(UnsupportedSite, match="reduction of 3"):
        peftcore.apply(host("vit"), "clip_adapter", target="classifier")
    with pytest.raises(UnsupportedSite, match="last dimension"):
        peftcore.apply(host("timm"), "clip_adapter", target="patch_embed.proj")
    with pytest.raises(UnsupportedSite, match="numbers of input and output features"):
        peftcore.apply(host("siglip"), "clip_adapter", target="head", features="input")


def wide() -> peftcore.Injection:
    return peftcore.apply(nn.Sequential(nn.Linear(2, 1024)), "clip_adapter", target="0")


@against("authors", "clip_adapter", **CODE, part="start")
def test_start() -> None:
    told, ours = frozen(NUMBERS, "start"), dict(wide().operators["0"].named_parameters())
    assert ours.keys() == told.keys()
    for name, parameter in ours.items():
        same_start(parameter, told[name])


@against("authors", "clip_adapter", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    names = {"adapter.fc.0.weight": "down.weight", "adapter.fc.2.weight": "up.weight"}
    ours = {name: p.numel() for name, p in wide().operators["0"].named_parameters() if p.requires_grad}
    assert ours == {names[name]: size for name, size in frozen(NUMBERS, "trains").items()}


@against("authors", "clip_adapter", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(wide().config, frozen(NUMBERS, "defaults"))
