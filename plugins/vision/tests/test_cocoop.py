"""CoCoOp: the authors' CLIP and learner, the equation image by image, and where it cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_equations import IDS, learned, logits_by_hand, openai_clip, table, text_features
from torch import Tensor
from vpt_equations import host, pixels, transformers, wave

import peftcore
from peftcore.errors import ConfigError, MissingContext, RouteError, SequenceError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS as KIT
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "cocoop.json"
CODE: Any = {"repository": "KaiyangZhou/CoOp", "commit": "ff61507", "script": "trainers/cocoop.py"}
TABLE = "text_model.embeddings.token_embedding"


@conformance(
    "cocoop",
    hosts=["clip"],
    options={"*": {"length": 2, "reduction": 4}, "task": {"length": 4}},
    expected_failures={"it_learns-task": "in 80 steps of SGD words that all names share gain a tenth, not a third"},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@against("authors", "cocoop", **CODE)
def test_the_authors_clip_with_the_same_numbers() -> None:
    """Logits, and the gradients of words and of both matrices."""
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in frozen(NUMBERS).items()}
    model = openai_clip(32)
    operator = peftcore.apply(model, "cocoop", length=2, dtype="float64").operators[TABLE]
    with torch.no_grad():
        operator.context.copy_(wave((2, 12), "ctx"))
        for layer, name in ((operator.down, "linear1"), (operator.up, "linear2")):
            layer.weight.copy_(wave(layer.weight.shape, f"meta_net.{name}.weight"))
            layer.bias.copy_(wave(layer.bias.shape, f"meta_net.{name}.bias"))
    logits = model(input_ids=IDS, pixel_values=wave((2, 3, 8, 8), "images")).logits_per_image
    (logits * wave((2, 3), "direction")).sum().backward()
    found = {"logits": logits, "context": operator.context.grad}
    found |= {"down": operator.down.weight.grad, "up": operator.up.weight.grad}
    for name, ours in found.items():
        torch.testing.assert_close(ours, numbers[name], rtol=1e-9, atol=1e-11)


def one_by_one(model: Any, images: Tensor, parameters: list[Tensor]) -> Tensor:
    """The equation: texts of one image after the other."""
    context, W1, b1, W2, b2 = parameters
    features, embedded = model.get_image_features(images).pooler_output, table(model)(IDS)
    rows = []
    for f in features:
        v = context + W2 @ (W1 @ (f / f.norm()) + b1).clamp(min=0) + b2
        texts = torch.cat([embedded[:, :1], v.expand(len(IDS), -1, -1), embedded[:, 3:]], 1)
        rows.append(logits_by_hand(model, text_features(model, texts, []), f[None])[0])
    return torch.stack(rows)


def test_each_image_has_texts_of_its_own() -> None:
    model, base = host("clip"), host("clip")
    injection = peftcore.apply(model, "cocoop", length=2, dtype="float64")
    fill(injection)
    model.train()  # no dropout, and nothing else that draws
    operator = injection.operators[TABLE]
    copies = [p.detach().clone().requires_grad_() for p in operator.parameters()]
    images = [pixels().requires_grad_() for _ in range(2)]
    output = model(input_ids=IDS, pixel_values=images[0])
    ours, expected = output.logits_per_image, one_by_one(base, images[1], copies)
    assert (expected - base(input_ids=IDS, pixel_values=pixels()).logits_per_image).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.logits_per_text, expected.T, rtol=1e-10, atol=1e-10)
    own = base.logit_scale.exp() * (output.image_embeds[:, None] * output.text_embeds).sum(-1)
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(expected)
    for each in (ours, expected):
        (each * direction).sum().backward()
    for mine, other in (*zip(operator.parameters(), copies, strict=True), images):
        assert other.grad is not None and other.grad.abs().max() > 1e-6
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-9)


def test_padding_on_the_left_and_masks_go_along() -> None:
    """The mask of a text is that of each of its copies."""
    model = host("clip")
    fill(peftcore.apply(model, "cocoop", length=2, dtype="float64"))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]])
    whole = model(input_ids=IDS, pixel_values=pixels(), attention_mask=mask).logits_per_image
    alone = [model(input_ids=IDS, pixel_values=each[None], attention_mask=mask).logits_per_image for each in pixels()]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-10, atol=1e-10)
    assert (whole - model(input_ids=IDS, pixel_values=pixels()).logits_per_image).abs().max() > 1e-4


def test_it_learns_to_tell_images_apart() -> None:
    model = host("clip")
    injection = peftcore.apply(model, "cocoop", length=2, dtype="float64", seed=0)
    losses = learned(model, injection, lr=0.1)
    assert losses[-1] < losses[0] * 2 / 3


def test_where_it_starts_and_how_large_it_is() -> None:
    injection = peftcore.apply(host("clip"), "cocoop", init_ids=[7, 3, 9, 3])
    assert torch.equal(injection.operators[TABLE].context, table(host("clip")).weight[[7, 3, 9, 3]].float())
    assert sum(p.numel() for p in injection.parameters()) == 4 * 32 + 513 * 32 + 33 * 32


def test_where_it_cannot_be() -> None:
    model = host("clip")
    peftcore.apply(model, "cocoop", length=2)
    with pytest.raises(MissingContext, match="words depend on the image"):
        model.get_text_features(IDS)
    with pytest.raises(SequenceError, match="return_loss"):
        model(input_ids=IDS, pixel_values=pixels(), return_loss=True)
    with pytest.raises(SequenceError, match="return_dict"):
        model(input_ids=IDS, pixel_values=pixels(), return_dict=False)
    with pytest.raises(RouteError, match="whole batch"):
        peftcore.route(model, ["cocoop", None])
    with pytest.raises(UnsupportedSite, match="0 projections of images"):
        peftcore.apply(KIT["bert"].build()[0], "cocoop")
    with pytest.raises(UnsupportedSite, match="reduction of 512"):
        peftcore.apply(host("clip"), "cocoop", reduction=513)
    with pytest.raises(ConfigError, match="vocabulary of 40"):
        peftcore.apply(host("clip"), "cocoop", init_ids=[40])


def sized(width: int, features: int) -> Any:
    """CLIP with texts of that width and images of so many features."""
    text = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    text |= {"vocab_size": 40, "max_position_embeddings": 6}
    vision = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    vision |= {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=features)
    return transformers.CLIPModel(config)


@against("authors", "cocoop", **CODE, part="start")
def test_start() -> None:
    told = frozen(NUMBERS, "start")
    same_start(peftcore.apply(sized(32, 32), "cocoop", length=1280).operators[TABLE].context, told.pop("context"))
    operator: Any = peftcore.apply(sized(1280, 1024), "cocoop").operators[TABLE]
    found = {"down.weight": operator.down.weight, "up.weight": operator.up.weight}
    assert found.keys() == told.keys()
    for name, each in found.items():
        same_start(each, told[name])


@against("authors", "cocoop", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    (operator,) = peftcore.apply(sized(12, 32), "cocoop", length=2).operators.values()
    names = {"context": "ctx", "down": "meta_net.linear1", "up": "meta_net.linear2"}
    ours = {}
    for name, parameter in operator.named_parameters():
        head, dot, kind = name.partition(".")
        if parameter.requires_grad:
            ours[f"prompt_learner.{names[head]}{dot}{kind}"] = parameter.numel()
    assert ours == frozen(NUMBERS, "trains")


@against("authors", "cocoop", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(host("clip"), "cocoop").config
    words = "only a tokenizer knows the ids of the words from which theirs start"
    same_defaults(config, frozen(NUMBERS, "defaults"), otherwise={"init_ids": words})
