"""MaPLe: the authors' towers, learner and start, the equation in CLIP and SigLIP, and where it cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_equations import IDS, learned, logits_by_hand, openai_clip, table, text_features
from torch import Tensor, nn
from vpt_equations import host, pixels, transformers, wave

import peftcore
from peftcore.errors import ConfigError, RouteError, SequenceError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS as KIT
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "maple.json"
CODE: Any = {"repository": "muzairkhattak/multimodal-prompt-learning", "commit": "69bce21"}
CODE["script"] = "trainers/maple.py"
TABLE = "text_model.embeddings.token_embedding"


@conformance(
    "maple",
    hosts=["clip"],
    options={"*": {"depth": 2}, "task": {"length": 4}},
    expected_failures={"it_learns-task": "in 80 steps of SGD prompts that all names share gain a fifth, not a third"},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("depth", [1, 2, 3])
@against("authors", "maple", **CODE)
def test_the_authors_towers_with_the_same_numbers(depth: int) -> None:
    """Logits, and the gradients of all prompts and maps."""
    numbers, model = frozen(NUMBERS)[str(depth)], openai_clip()
    operators = [*peftcore.apply(model, "maple", depth=depth, dtype="float64").operators.values()]
    with torch.no_grad():
        for j, each in enumerate(operators):
            each.rows.copy_(wave((2, 12), f"rows.{j}"))
            each.map.weight.copy_(wave((16, 12), f"map.{j}"))
            each.map.bias.copy_(wave((16,), f"bias.{j}"))
    logits = model(input_ids=IDS, pixel_values=wave((2, 3, 8, 8), "images")).logits_per_image
    (logits * wave((2, 3), "direction")).sum().backward()
    found = {"rows": [each.rows.grad for each in operators], "map": [each.map.weight.grad for each in operators]}
    torch.testing.assert_close(logits, torch.tensor(numbers["logits"], dtype=torch.float64), rtol=1e-11, atol=1e-11)
    for name, gradients in found.items():
        for ours, theirs in zip(gradients, numbers[name], strict=True):
            torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-9, atol=1e-11)


def clip_b16(blocks: int) -> Any:
    """Returns a CLIP as wide as that of ViT-B/16, on which the authors' prompts rely, with small pictures."""
    small = {"num_hidden_layers": blocks, "intermediate_size": 8, "num_attention_heads": 8}
    text = {**small, "hidden_size": 512, "vocab_size": 40, "max_position_embeddings": 6}
    vision = {**small, "hidden_size": 768, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


@against("authors", "maple", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Each draw; the authors copy one map for all deeper blocks, here each has its own, as the docstring says."""
    told = frozen(NUMBERS, "start")
    operators = [*peftcore.apply(clip_b16(7), "maple", length=80, depth=7).operators.values()]
    for j, each in enumerate(operators[:2]):
        same_start(each.rows, told[f"rows.{j}"])
        same_start(each.map.weight, told[f"map.{j}.weight"])
    biases = torch.cat([each.map.bias for each in operators])  # one has 768 numbers
    same_start(biases, told["map.0.bias"])
    same_start(biases, told["map.1.bias"])


@against("authors", "maple", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    found: dict[str, int] = {}
    for j, each in enumerate(peftcore.apply(clip_b16(2), "maple", depth=2).operators.values()):
        for name, parameter in each.named_parameters():
            kind, _, tensor = name.partition(".")
            found[f"{kind}.{j}" + (f".{tensor}" if tensor else "")] = parameter.numel()
    assert found == frozen(NUMBERS, "trains")


@against("authors", "maple", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(clip_b16(9), "maple").config
    same_defaults(
        config, frozen(NUMBERS, "defaults"), otherwise={"init_ids": "only a tokenizer knows their words' ids"}
    )


def of_images(model: Any, images: Tensor, prompts: list[Tensor]) -> Tensor:
    """The features of images, with prompts behind the tokens, as the authors have them."""
    vision, n = model.vision_model, len(prompts[0])
    x = vision.embeddings(images)
    x = vision.pre_layrnorm(torch.cat([x, prompts[0].expand(len(x), -1, -1)], 1))
    for number, block in enumerate(vision.encoder.layers):
        if 0 < number < len(prompts):
            x = torch.cat([x[:, :-n], prompts[number].expand(len(x), -1, -1)], 1)
        x = block(x, None)
    features: Tensor = model.visual_projection(vision.post_layernorm(x[:, 0]))
    return features


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_equation_in_training_too(depth: int) -> None:
    model, base = host("clip"), host("clip")
    injection = peftcore.apply(model, "maple", depth=depth, dtype="float64")
    fill(injection)
    model.train()  # no dropout, and nothing else that draws
    operators = [*injection.operators.values()]
    copies = [[p.detach().clone().requires_grad_() for p in each.parameters()] for each in operators]
    rows = [each[0] for each in copies]
    made = [nn.functional.linear(*each) for each in copies]
    images = [pixels().requires_grad_() for _ in range(2)]
    embedded = table(base)(IDS)
    embedded = torch.cat([embedded[:, :1], rows[0].expand(3, -1, -1), embedded[:, 3:]], 1)
    expected = logits_by_hand(base, text_features(base, embedded, rows), of_images(base, images[1], made))
    ours = model(input_ids=IDS, pixel_values=images[0]).logits_per_image
    plain = base(input_ids=IDS, pixel_values=pixels()).logits_per_image
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(expected)
    for output in (ours, expected):
        (output * direction).sum().backward()
    torch.testing.assert_close(images[0].grad, images[1].grad, rtol=1e-8, atol=1e-9)
    for each, copied in zip(operators, copies, strict=True):
        for mine, other in zip(each.parameters(), copied, strict=True):
            assert other.grad is not None and other.grad.abs().max() > 1e-5
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("first", ["maple", "vpt_shallow"])
def test_prompts_of_others_stay_beside(first: str) -> None:
    """Attention takes tokens as a set: in whatever order both came, the features of images are the same."""
    model, other = host("clip"), host("clip")
    options: dict[str, dict[str, Any]] = {"maple": {"depth": 2}, "vpt_shallow": {"length": 3}}
    orders = [[first, *options.keys() - {first}], [*options.keys() - {first}, first]]
    for each, order in zip((model, other), orders, strict=True):
        for name in order:
            fill(peftcore.apply(each, name, dtype="float64", seed=0, **options[name]))
        peftcore.activate(each, *order)
    one, two = (each.get_image_features(pixels()).pooler_output for each in (model, other))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    peftcore.activate(model, "maple")
    assert (model.get_image_features(pixels()).pooler_output - one).abs().max() > 1e-3


def test_it_learns_to_tell_images_apart() -> None:
    model = host("clip")
    injection = peftcore.apply(model, "maple", depth=2, dtype="float64", seed=0)
    losses = learned(model, injection, lr=0.035)
    assert losses[-1] < losses[0] / 2


def test_where_it_starts_and_how_large_it_is() -> None:
    model = host("clip")
    injection = peftcore.apply(model, "maple", depth=2, init_ids=[7, 9])
    first, second = injection.operators.values()
    assert [*injection.operators] == [TABLE, "text_model.encoder.layers.0"]
    assert torch.equal(first.rows, table(model).weight[[7, 9]].float())
    assert second.rows.shape == (2, 32) and 0.01 < second.rows.std() < 0.03
    assert sum(p.numel() for p in injection.parameters()) == 2 * (2 * 32 + 33 * 16)


def test_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match="depth=9, but the towers of this CLIPModel have only 3 blocks"):
        peftcore.apply(host("clip"), "maple")
    with pytest.raises(ConfigError, match="length cannot change at single sites"):
        peftcore.apply(host("clip"), "maple", depth=2, overrides={"text_model.encoder.layers.0": {"length": 3}})
    with pytest.raises(UnsupportedSite, match="no blocks that process patches"):
        peftcore.apply(KIT["bert"].build()[0], "maple", depth=1)
    model = host("clip")
    peftcore.apply(model, "maple", depth=2, length=6)
    with pytest.raises(SequenceError, match="6 positions"):
        model(input_ids=IDS, pixel_values=pixels())
    with pytest.raises(RouteError, match="whole batch"):
        peftcore.route(model, ["maple", None])
