"""Visual prompting in pixels: the authors' prompters with their start and options, hosts whose positions say how
large pictures are, the rate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vpt_equations import HOSTS, host, pixels, timm, transformers, wave

import peftcore
from peftcore.errors import TargetError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.checks_learning import SHARE
from peftcore.testing.hosts import HOSTS as SMALL
from peftcore.testing.kit import fill
from peftcore.testing.learning_tasks import STEPS, TASKS, full_fine_tuning

NUMBERS = Path(__file__).parent / "numbers" / "pixel_vp.json"
CODE: Any = {"repository": "hjbahng/visual_prompting", "commit": "679e71f", "script": "models/prompters.py"}
SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
TAKEN = {"unet": {"picture": (8, 8)}, "dit": {"picture": (8, 8)}, "convnet": {"picture": (9, 9)}}
SCALE = "its rate is one for 224 x 224 pixels behind CLIP's scale; what it learns here is in test_it_learns"


@conformance(
    "pixel_vp", options=TAKEN, telling=("vit", "convnet"), expected_failures={"it_learns-task": SCALE}
)  # elsewhere nothing reads pictures
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_it_learns() -> None:
    """As the kit's check, with a frame that is the whole of small pictures, and a smaller rate."""
    task = next(iter(TASKS))
    model = task.pretrained()
    base = task.scored(model)
    injection = peftcore.apply(model, "pixel_vp", size=4, std=0.0)
    task.learn(model, injection.optimizer(torch.optim.SGD, lr=0.2, momentum=0.9), 0, STEPS)
    assert task.scored(model) - base >= SHARE * (full_fine_tuning(task) - base)


@pytest.mark.parametrize("shape", ["frame", "square", "random"])
@against("authors", "pixel_vp", **CODE)
def test_the_authors_prompters_with_the_same_numbers(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = frozen(NUMBERS)[shape]
    model = timm.models.VisionTransformer(**SIZES).double().eval()
    injection = peftcore.apply(model, "pixel_vp", shape=shape, size=2 if shape == "frame" else 3, dtype="float64")
    [operator] = injection.operators.values()
    names = ("up", "down", "left", "right") if shape == "frame" else ("square",)
    own = [operator.get_parameter(name) for name in names]
    theirs = [f"pad_{name}" if shape == "frame" else "patch" for name in names]
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *zip(theirs, own, strict=True)):
            shown = (1, *parameter.shape) if name in theirs else parameter.shape
            parameter.copy_(wave(shown, name).view(parameter.shape))
    images = wave((2, 3, 8, 8), "images").requires_grad_()
    expected = torch.tensor(numbers["prompted"], dtype=torch.float64)
    if shape == "random":  # where theirs was drawn
        top, left = (expected - images[0, 0]).nonzero()[0].tolist()
        assert (top, left) != (0, 0)
        places = iter([top, left])
        monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(next(places)))
    logits = model(images)
    torch.testing.assert_close(logits, torch.tensor(numbers["logits"], dtype=torch.float64), **CLOSE)
    found = torch.autograd.grad((logits * wave((2, 3), "direction")).sum(), [*own, images])
    assert {*numbers["gradients"]} == {*theirs, "images"}
    for name, gradient in zip((*theirs, "images"), found, strict=True):
        told = torch.tensor(numbers["gradients"][name], dtype=torch.float64)
        gradient = gradient[:, 0] if name == "images" else gradient[None]
        torch.testing.assert_close(gradient, told, msg=name, **CLOSE)
        assert told.abs().max() > 1e-6


def reading(**options: Any) -> Any:
    """Returns an injection at what reads pictures of 224 by 224."""
    return peftcore.apply(nn.Sequential(nn.Conv2d(3, 2, 16, stride=16)), "pixel_vp", **options)


@against("authors", "pixel_vp", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Squares are larger than 30, for the number of their pixels."""
    told, found = frozen(NUMBERS, "start"), {}
    for shape in ("frame", "square", "random"):
        (operator,) = reading(shape=shape, size=None if shape == "frame" else 120).operators.values()
        found |= dict(operator.named_parameters(shape))
    assert found.keys() == told.keys()
    for name, tensor in found.items():
        same_start(tensor, told[name])


@against("authors", "pixel_vp", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    told = frozen(NUMBERS, "trains")
    found = {shape: [[*each.shape] for each in reading(shape=shape).parameters()] for shape in told}
    assert found == told


@against("authors", "pixel_vp", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection, told = reading(), frozen(NUMBERS, "defaults")
    (operator,) = injection.operators.values()
    assert (operator.size, operator.picture[1:]) == (told["size"], (224, 224))
    why = {"size": "None is theirs in pictures as large as theirs", "picture": "None is theirs without positions"}
    same_defaults(injection.config, told, otherwise=why)


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "timm", "timm_mean", "timm_distilled", "torchvision"])
def test_pictures_are_as_large_as_positions_say(name: str) -> None:
    """With and without a class token, registers, a tower of texts, in training mode: the prompt is in the picture."""
    model, images = host(name), pixels()
    injection = peftcore.apply(model, "pixel_vp", dtype="float64", size=3)
    fill(injection)
    [operator] = injection.operators.values()
    v = torch.zeros(3, 8, 8, dtype=torch.float64)
    v[:, :3], v[:, 5:], v[:, 3:5, :3], v[:, 3:5, 5:] = operator.up, operator.down, operator.left, operator.right
    plain = HOSTS[name].run(host(name).train(), images)
    ours = HOSTS[name].run(model.train(), images)
    torch.testing.assert_close(ours, HOSTS[name].run(host(name).train(), images + v), **CLOSE)
    assert (ours - plain).abs().max() > 1e-3
    assert sum(each.numel() for each in injection.parameters()) == 2 * 3 * 3 * (16 - 6)


def test_random_squares_lie_anywhere_but_at_the_end() -> None:
    model, images = nn.Sequential(nn.Conv2d(1, 1, 1, stride=1)), torch.zeros(1, 1, 4, 6)
    injection = peftcore.apply(model, "pixel_vp", shape="random", size=2, picture=(4, 6))
    [operator] = injection.operators.values()
    operator.square.data.fill_(1.0)
    places = {tuple(operator.prompt()[0].nonzero()[0].tolist()) for _ in range(200)}
    assert places == {(top, left) for top in range(2) for left in range(4)}
    assert injection.model(images).shape == images.shape


def test_shares_of_pictures() -> None:
    config = transformers.ViTConfig(image_size=224, patch_size=16, num_hidden_layers=1)
    injection = peftcore.apply(transformers.ViTModel(config), "pixel_vp")
    assert sum(each.numel() for each in injection.parameters()) == 69_840
    small = peftcore.apply(timm.create_model("resnet18"), "pixel_vp", picture=(64, 128))
    assert next(iter(small.operators.values())).size == 9


def test_refused() -> None:
    model = timm.create_model("resnet18", num_classes=2)
    peftcore.apply(model, "pixel_vp")
    with pytest.raises(UnsupportedSite, match=r"apply with picture=\(64, 32\)"):
        model(torch.randn(1, 3, 64, 32))
    for shape, size in (("frame", 5), ("square", 8), ("random", 8)):
        with pytest.raises(UnsupportedSite, match="are too small"):
            peftcore.apply(host("timm"), "pixel_vp", shape=shape, size=size)
    with pytest.raises(UnsupportedSite, match="such convolutions are: none"):
        peftcore.apply(SMALL["llama"].build()[0], "pixel_vp")
    with pytest.raises(UnsupportedSite, match=r"patch_embed\.proj"):
        peftcore.apply(host("timm"), "pixel_vp", target="head")
    with pytest.raises(TargetError):
        peftcore.apply(host("timm"), "pixel_vp", target="nowhere")
