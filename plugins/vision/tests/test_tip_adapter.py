"""Tip-Adapter: the authors' cache, logits, gradients and start, the equation in CLIP, and what data is of no use."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vpt_equations import host, pixels, wave

import peftcore
from peftcore.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    RouteError,
    SequenceError,
    TargetError,
    UnsupportedSite,
)
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "tip_adapter.json"
CODE: Any = {"repository": "gaopengcuhk/Tip-Adapter", "commit": "d0e2d6f", "script": "main.py"}
IDS = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0], [1, 8, 2, 0]])
LABELS = torch.tensor([2, 0])


@conformance(
    "tip_adapter",
    hosts=["bert", "vit", "convnet"],  # the kit's classifiers
    options={
        "*": {"features": "input", "passes": 1},
        **{name: {"images": images, "classes": 2} for name, images in (("bert", 4), ("vit", 4), ("convnet", 6))},
        "task": {"alpha": 0.02, "beta": 0.2},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Drawn:
    """Five images with labels in two batches, other augmentations of them in each pass, as in the authors' numbers."""

    def __init__(self, shuffled: bool = False) -> None:
        self.passes, self.shuffled = 0, shuffled

    def __iter__(self) -> Iterator[Any]:
        images, labels = wave((5, 8), f"images.{self.passes}"), torch.tensor([2, 0, 1, 1, 2])
        if self.shuffled and self.passes:
            images, labels = images.flip(0), labels.roll(1)
        self.passes += 1
        yield from (peftcore.Labelled((images[part],), labels[part]) for part in (slice(3), slice(3, 5)))


def classifier() -> Any:
    """The authors' classifier of texts."""
    model = nn.Sequential(nn.Linear(8, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(100 * wave((8, 3), "texts").T)
    return model


def cached(model: nn.Module, data: Drawn, **options: Any) -> peftcore.Injection:
    """Apply to the authors' classifier."""
    options |= {"target": "0", "features": "input", "dtype": "float64"}
    return peftcore.apply(model, "tip_adapter", data=data, **options)


@against("authors", "tip_adapter", **CODE)
def test_the_authors_cache_with_the_same_numbers() -> None:
    """Keys from three augmentations, logits, and the gradient of the keys."""
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in frozen(NUMBERS).items()}
    model, data = classifier(), Drawn()
    (operator,) = cached(model, data, alpha=1.2, beta=5.5, passes=3).operators.values()
    assert data.passes == 3
    f = wave((4, 8), "features")
    logits = model(f / f.norm(dim=-1, keepdim=True))
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    found = {"keys": operator.keys.T, "logits": logits, "gradient": operator.keys.grad}
    found["values"] = nn.functional.one_hot(operator.labels).double()
    for name, ours in found.items():
        torch.testing.assert_close(ours, numbers[name], rtol=1e-12, atol=1e-12)


@against("authors", "tip_adapter", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """The features of images, of length one, from three augmentations of each, with their labels."""
    told = frozen(NUMBERS, "start")
    (operator,) = cached(classifier(), Drawn(), passes=3).operators.values()
    same_start(operator.keys, told["keys"])
    same_start(operator.labels, told["labels"])


@against("authors", "tip_adapter", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    injection = cached(classifier(), Drawn(), passes=3)
    assert [[*each.shape] for each in injection.parameters()] == frozen(NUMBERS, "trains")


@against("authors", "tip_adapter", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(cached(classifier(), Drawn()).config, frozen(NUMBERS, "defaults"))


def few(model: nn.Module, **options: Any) -> peftcore.Injection:
    """Apply to CLIP, with two images and the texts of three classes, and move the keys by N(0, 0.1)."""
    data = [{"input_ids": IDS, "pixel_values": pixels(), "labels": LABELS}]
    injection = peftcore.apply(model, "tip_adapter", data=data, dtype="float64", **options)
    fill(injection)
    return injection


def test_images_and_texts_are_compared_with_the_cache_beside() -> None:
    """The equation once more, a sum over images, with gradients of keys and of images."""
    model, base = host("clip"), host("clip")
    injection = few(model, alpha=2.0, beta=3.0)
    assert list(injection.operators) == ["visual_projection"]
    operator = injection.operators["visual_projection"]
    keys = operator.keys.detach().clone().requires_grad_()
    own = base.get_image_features(pixels()).pooler_output
    assert 0.5 < (keys - own / own.norm(dim=-1, keepdim=True)).std() / 0.1 < 1.5
    images = [(pixels() + 1).requires_grad_() for _ in range(2)]
    ours = model(input_ids=IDS, pixel_values=images[0])
    plain = base(input_ids=IDS, pixel_values=images[1])
    f = plain.image_embeds
    expected = plain.logits_per_image.clone()
    for n, label in enumerate(LABELS):
        expected[:, label] = expected[:, label] + 2.0 * torch.exp(-3.0 * (1 - (f * keys[n]).sum(-1)))
    assert (expected - plain.logits_per_image).abs().max() > 1e-3
    torch.testing.assert_close(ours.logits_per_image, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.logits_per_text, expected.T, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(expected)
    for output in (ours.logits_per_image, expected):
        (output * direction).sum().backward()
    for mine, other in ((operator.keys, keys), images):
        assert mine.grad is not None and other.grad is not None and other.grad.abs().max() > 1e-4
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-9)


def test_what_is_found_is_in_options_count_and_file(tmp_path: Path) -> None:
    model, other = host("clip"), host("clip")
    injection = few(model)
    assert injection.config.overrides == {"visual_projection": {"images": 2, "classes": 3}}
    assert sum(p.numel() for p in injection.parameters()) == 2 * 512
    injection.save(tmp_path / "file")
    peftcore.load(other, tmp_path / "file")
    both = [each(input_ids=IDS, pixel_values=pixels()).logits_per_image for each in (model, other)]
    assert torch.equal(*both)
    injection.operators["visual_projection"].labels[0] = 3
    injection.save(tmp_path / "damaged")
    with pytest.raises(CheckpointError, match="labels holds others than 0 to 2"):
        peftcore.load(host("clip"), tmp_path / "damaged")


def test_keys_may_stay_as_they_are(tmp_path: Path) -> None:
    model, other = host("clip"), host("clip")
    injection = few(model, train_keys=False)
    assert not [*injection.parameters()] and "keys" in dict(injection.operators["visual_projection"].named_buffers())
    injection.save(tmp_path)
    peftcore.load(other, tmp_path)
    both = [each(input_ids=IDS, pixel_values=pixels()).logits_per_image for each in (model, other)]
    assert torch.equal(*both) and not torch.equal(
        both[0], host("clip")(input_ids=IDS, pixel_values=pixels()).logits_per_image
    )


class Head(nn.Module):
    """A classifier that takes labels and does nothing with them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(input)


def test_data_without_augmentations_is_gone_through_twice() -> None:
    passes: list[int] = []

    class Same:
        def __iter__(self) -> Iterator[Any]:
            passes.append(1)
            yield {"input": wave((2, 8), "images"), "labels": LABELS}

    peftcore.apply(Head().double(), "tip_adapter", data=Same(), target="head", features="input", dtype="float64")
    assert len(passes) == 2


def test_a_part_of_a_hybrid_is_told_its_sizes() -> None:
    cache = {"method": "tip_adapter", "features": "input", "target": "0", "passes": 3}
    with pytest.raises(
        ConfigError, match=r"pass the decisions to the part: overrides=\{'0': \{'images': 5, 'classes': 3\}\}"
    ):
        peftcore.apply(classifier(), [cache, {"method": "ia3", "target": "0"}], data=Drawn())
    parts = [{**cache, "images": 5, "classes": 4}, {"method": "ia3", "target": "0"}]
    injection = peftcore.apply(classifier(), parts, data=Drawn(), dtype="float64")
    keys = torch.tensor(frozen(NUMBERS)["keys"], dtype=torch.float64).T
    (operator,) = (each for each in injection.operators.values() if "labels" in dict(each.named_buffers()))
    torch.testing.assert_close(operator.keys, keys, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"input_ids": IDS, "pixel_values": pixels()}], "has no labels"),
        ([{"input_ids": IDS, "pixel_values": pixels(), "labels": torch.tensor([0.5, 1.0])}], "class numbers"),
        ([{"input_ids": IDS, "pixel_values": pixels(), "labels": torch.tensor([-100, 1])}], "class numbers"),
        ([{"input_ids": IDS, "pixel_values": pixels(), "labels": torch.tensor([1])}], r"gave \(2, 512\)"),
        ([lambda model: model.get_text_features(IDS).pooler_output.sum()], "does not call the model"),
    ],
)
def test_data_that_is_of_no_use(data: list[Any], message: str) -> None:
    with pytest.raises((CalibrationError, UnsupportedSite), match=message):
        peftcore.apply(host("clip"), "tip_adapter", data=data)


def test_where_it_cannot_be() -> None:
    with pytest.raises(CalibrationError, match="another order"):
        peftcore.apply(classifier(), "tip_adapter", data=Drawn(shuffled=True), target="0", features="input")
    with pytest.raises(CalibrationError, match="images=3"):
        peftcore.apply(classifier(), "tip_adapter", data=Drawn(), target="0", features="input", passes=1, images=3)
    with pytest.raises(TargetError, match="no projection of images"):
        peftcore.apply(host("vit"), "tip_adapter", data=[{"pixel_values": pixels(), "labels": LABELS}])
    model = host("clip")
    few(model)
    with pytest.raises(RouteError, match="cannot be distinguished"):
        peftcore.route(model, ["tip_adapter", None])
    for wrong, message in (
        ({"return_dict": False}, "logits_per_image"),
        ({"return_loss": True, "input_ids": IDS[:2]}, "return_loss"),
        ({"input_ids": IDS[:2]}, "2 texts, but there are 3 classes"),
    ):
        with pytest.raises(SequenceError, match=message):
            model(**{"input_ids": IDS, "pixel_values": pixels(), **wrong})
