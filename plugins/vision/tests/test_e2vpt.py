"""E2VPT: the authors' class and their pruning, the equation on two kinds of attention, and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vpt_equations import (
    ATTENTIONS,
    HOSTS,
    TIMM,
    by_hand,
    edit_attention,
    host,
    of_waves,
    pixels,
    prompted,
    timm,
    wave,
)

import peftcore
from peftcore.errors import CalibrationError, ConfigError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore_vision.e2vpt import KeyValueOperator, PrunedOperator, importance, prune

NUMBERS = Path(__file__).parent / "numbers" / "e2vpt.json"
CODE: Any = {"repository": "ChengHan111/E2VPT", "commit": "7a66e75", "script": "src/models/vit_prompt/vit_prompt_VK.py"}
TINY: dict[str, Any] = {"length": 3, "kv_length": 2, "segments": 4}


@conformance("e2vpt", hosts=["vit", "dit"])  # the kit's other hosts have no image in patches
def test_conformance(check: Callable[[], None]) -> None:
    check()


def pairs(injection: peftcore.Injection) -> list[KeyValueOperator]:
    return [each for each in injection.operators.values() if isinstance(each, KeyValueOperator)]


def authors_model(**options: Any) -> tuple[nn.Module, peftcore.Injection]:
    model, injection = of_waves("e2vpt", **TINY, **options)
    with torch.no_grad():
        for number, operator in enumerate(pairs(injection)):
            for name, parameter in operator.named_parameters():
                parameter.copy_(wave(parameter.shape, f"{name}.{number}"))
    return model, injection


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("projection", [None, 6])
@against("authors", "e2vpt", **CODE)
def test_the_authors_class_with_the_same_numbers(shared: bool, projection: int | None) -> None:
    model, _ = authors_model(share_kv=shared, projection=projection)
    expected = torch.tensor(frozen(NUMBERS)["logits"][f"{shared} {projection}"], dtype=torch.float64)
    torch.testing.assert_close(model(wave((2, 3, 8, 8), "images")), expected, rtol=1e-11, atol=1e-11)


def loss(number: int, model: nn.Module) -> Tensor:
    logits: Tensor = model(wave((2, 3, 8, 8), f"batch.{number}"))
    return nn.functional.cross_entropy(logits, torch.tensor([0, 2]))


@against("authors", "e2vpt", **CODE)
def test_pruning_as_the_authors_do_it() -> None:
    expected = frozen(NUMBERS)["pruned"]
    trained, fresh = authors_model(), authors_model()
    trained[0].train()
    data = [partial(loss, 0), partial(loss, 1)]
    scores = importance(trained[1], data)
    assert all(module.training for module in trained[0].modules())
    torch.testing.assert_close(scores, torch.tensor(expected["segments"], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    tokens = torch.tensor(expected["tokens"], dtype=torch.float64)
    torch.testing.assert_close(scores.sum(1), tokens, rtol=1e-9, atol=1e-12)
    prune(fresh[1], scores, tokens=1, segments=2)
    logits = torch.tensor(expected["logits"], dtype=torch.float64)
    torch.testing.assert_close(fresh[0](wave((2, 3, 8, 8), "images")), logits, rtol=1e-11, atol=1e-11)
    sizes = torch.stack([importance(trained[1], [each]) for each in data]).abs().mean(0)
    torch.testing.assert_close(importance(trained[1], data, absolute=True), sizes)


@pytest.mark.parametrize("shared", [True, False])
@against("authors", "e2vpt", **CODE, part="start")
def test_start(shared: bool) -> None:
    """3,000 keys, values and tokens of the last block."""
    options = {"length": 3000, "kv_length": 3000, "segments": 4, "share_kv": shared}
    injection = peftcore.apply(timm.models.VisionTransformer(**TIMM), "e2vpt", **options)
    own = (injection.operators["blocks.2"], injection.operators["blocks.2.attn:attention"])
    found = {name: tensor for operator in own for name, tensor in operator.named_parameters()}
    told = frozen(NUMBERS, "start")[str(shared)]
    assert found.keys() == told.keys() == ({"prompt", "key"} if shared else {"prompt", "key", "value"})
    for name, each in found.items():
        same_start(each, told[name])


@against("authors", "e2vpt", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train_of_pruned_prompts() -> None:
    """At first theirs trains its masks too, which here are 1, as the module says."""
    injection = peftcore.apply(timm.models.VisionTransformer(**TIMM), "e2vpt", **TINY)
    prune(injection, torch.arange(12.0).view(3, 4), tokens=1, segments=1)
    first, *later = (each.prompt.numel() for each in injection.operators.values() if isinstance(each, PrunedOperator))
    found = {"enc.transformer.prompt_embeddings": first, "enc.transformer.deep_prompt_embeddings": sum(later)}
    for number, own in enumerate(pairs(injection)):
        name = f"enc.transformer.encoder.layer.{number}.attn.deep_QKV_embeddings"
        found[name] = sum(each.numel() for each in own.parameters())
    found |= {f"head.last_layer.{name}": each.numel() for name, each in injection.model.head.named_parameters()}
    told = frozen(NUMBERS, "trains")
    assert found == told["again"]
    assert sum(each.numel() for each in injection.parameters()) == sum(found.values())
    assert all("_mask_" in name for name in told["first"].keys() - found.keys())


@against("authors", "e2vpt", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    sizes = {**TIMM, "embed_dim": 32}  # which 16 segments divide
    config = peftcore.apply(timm.models.VisionTransformer(**sizes), "e2vpt").config
    same_defaults(config, frozen(NUMBERS, "defaults"))


def test_what_was_pruned_is_kept_in_files(tmp_path: Path) -> None:
    model, injection = authors_model()
    prune(injection, torch.arange(12.0).view(3, 4), tokens=1, segments=1)
    injection.save(tmp_path)
    fresh, _ = authors_model()
    peftcore.load(fresh, tmp_path, name="again")
    peftcore.activate(fresh, "again")
    images = wave((2, 3, 8, 8), "images")
    torch.testing.assert_close(fresh(images), model(images), rtol=0, atol=0)


def in_front(own: KeyValueOperator, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    fronts = (own.key, own.key if own.value is None else own.value)
    first, second = (
        torch.cat([front.expand(len(key), -1, -1, -1), made], 2)
        for front, made in zip(fronts, (key, value), strict=True)
    )
    return first, second


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_equation(name: str, shared: bool) -> None:
    model, base, images = host(name), host(name), pixels()
    injection, prompts = prompted(model, "e2vpt", share_kv=shared, segments=4)
    prune(injection, torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), tokens=1, segments=2)
    kept = next(iter(injection.operators.values())).kept.repeat(1, 4)
    assert kept.sum() == 3 * 8
    ours = HOSTS[name].run(model.train(), images)
    direction = torch.randn_like(ours)
    parameters = [*prompts, *(each for operator in pairs(injection) for each in operator.parameters())]
    mine = torch.autograd.grad((ours * direction).sum(), parameters)
    edit_attention(name, base, [partial(in_front, own) for own in pairs(injection)])
    expected = by_hand(name, base, images, [prompt * kept for prompt in prompts])
    assert (expected - HOSTS[name].run(host(name), images)).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_dropout_takes_keys_and_values_apart() -> None:
    model = host("timm").train()
    (own, *_) = pairs(prompted(model, "e2vpt", segments=4, kv_dropout=0.5)[0])
    seen: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.extend((key, value))
        return query

    empty = torch.zeros(2, 2, 0, 8, dtype=torch.float64)
    own.forward(attend, empty, empty, empty)  # type: ignore[arg-type]
    key, value = seen
    twice = own.key.expand(2, -1, -1, -1) * 2
    assert all(bool(((each == 0) | (each == twice)).all()) for each in seen)
    assert not torch.equal(key, value)


def test_refused() -> None:
    model = host("timm")
    with pytest.raises(UnsupportedSite, match="not a multiple of segments=5"):
        prompted(model, "e2vpt", segments=5)
    injection, _ = prompted(model, "e2vpt", segments=4)
    for scores, numbers in [
        (torch.zeros(4, 3), {}),
        (torch.zeros(4, 4), {"tokens": 4}),
        (torch.zeros(4, 4), {"segments": 4}),
    ]:
        with pytest.raises(ConfigError, match="keep at least one of each"):
            prune(injection, scores, **numbers)
    with pytest.raises(CalibrationError):
        importance(injection, [])
    other, _ = prompted(host("timm"), "vpt_deep")
    with pytest.raises(ConfigError, match="prompts of several lengths"):
        importance(other, [partial(loss, 0)])
