"""Folding an injection into the weights and the exact way back; a refusal changes nothing."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_toys import Doubling, Shift, TiedLanguageModel, perceptron, snapshot, stir
from torch import nn

import peftcore
from peftcore.errors import ConfigError, MergeError, NotMergeable
from peftcore.injection.merging import merged_tensors

X = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.mark.parametrize("keep", ["cpu", "device", "record"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_gives_every_bit_back(keep: Any, dtype: torch.dtype) -> None:
    model = perceptron().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    injection = peftcore.apply(model, "lora", target=["first", "second"], train=["second.bias"])
    stir(injection)
    expected = model(X.to(dtype))
    injection.merge(keep=keep)
    assert not torch.equal(model.first.weight, before["first.weight"])
    torch.testing.assert_close(model(X.to(dtype)), expected, rtol=2e-2, atol=2e-2)
    injection.unmerge()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_merge_writes_what_it_says_beforehand() -> None:
    model = perceptron()
    injection = peftcore.apply(model, Shift, target=["first", "second"])
    said = merged_tensors(injection)
    assert set(said) == {("first", "weight"), ("second", "weight")}
    report = injection.merge()
    assert report.tensors == 2 and report.dense == () and str(report).startswith("2 tensors merged")
    assert all(torch.equal(model.get_submodule(path).weight, value) for (path, _), value in said.items())


def test_a_record_that_fits_no_more_is_an_error() -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target="first")
    stir(injection)
    injection.merge(keep="record")
    stir(injection, seed=1)
    with pytest.raises(MergeError, match="record of the merge does not fit"):
        injection.unmerge()


def test_an_argument_that_no_merge_has_is_an_error() -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target="first")
    before = snapshot(model)
    for wrong, words in (
        ({"into": "bananas"}, "into='bananas' is not valid: use one of 'float', 'same'"),
        ({"keep": "disk"}, "keep='disk' is not valid: use one of 'cpu', 'device', 'record', None"),
        ({"weight": float("nan")}, "weight=nan is not valid: use a finite number"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            injection.merge(**wrong)
        assert snapshot(model) == before and not injection.merged


def test_merging_again_is_the_same_or_refused() -> None:
    model = perceptron()
    injection = peftcore.apply(model, Shift, target="first")
    ways: list[dict[str, Any]] = [
        {},
        {"keep": "record"},
        {"keep": None},
        {"into": "same"},
        {"weight": 0.5},
        {"max_error": 0.1},
    ]
    for way in ways:
        report = injection.merge(**way)
        merged = model.first.weight.detach().clone()
        assert injection.merge(**way) is report
        for other in (each for each in ways if each != way):
            with pytest.raises(MergeError, match=r"is merged already, .*unmerge"):
                injection.merge(**other)
        assert torch.equal(model.first.weight, merged)
        if way == {"keep": None}:
            injection.bake()
            assert torch.equal(model.first.weight, merged)
            injection = peftcore.apply(model, Shift, target="first")
        else:
            with injection.disabled():
                assert not injection.merged
            assert injection.merged and torch.equal(model.first.weight, merged)
            injection.unmerge()


@pytest.mark.parametrize("way", [{"weight": 0.5}, {"keep": "record"}, {"keep": None}], ids=str)
def test_baking_keeps_the_merge_that_is_in_force(way: dict[str, Any]) -> None:
    model = perceptron()
    injection = peftcore.apply(model, Shift, target="first")
    injection.merge(**way)
    merged = model.first.weight.detach().clone()
    injection.bake()
    assert torch.equal(model.first.weight, merged) and not injection.merged and type(model.first) is nn.Linear
    assert all(each.requires_grad for each in model.parameters())


def not_finite(model: nn.Module) -> peftcore.Injection:
    injection = peftcore.apply(model, Shift, target=["first", "second"])
    with torch.no_grad():
        injection.operators["second"].shift[0, 0] = torch.inf
    return injection


def below_another(model: nn.Module) -> peftcore.Injection:
    peftcore.apply(model, Shift, name="below", target="first")
    return peftcore.apply(model, Shift, name="above", target="first")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda model: peftcore.apply(model, Doubling, target="first"), NotMergeable, "not a function of the weight"),
        (not_finite, MergeError, "would not be finite"),
        (below_another, MergeError, "merge 'below' first"),
    ],
    ids=["no merged form", "not finite", "order"],
)
def test_what_cannot_be_merged_is_refused_and_nothing_changes(
    make: Callable[[nn.Module], peftcore.Injection], error: type[Exception], words: str
) -> None:
    model = perceptron()
    injection = make(model)
    before = snapshot(model)
    with pytest.raises(error, match=words):
        injection.merge()
    assert snapshot(model) == before and not injection.merged


def test_a_weight_that_is_tied_elsewhere_is_refused() -> None:
    model = TiedLanguageModel()
    injection = peftcore.apply(model, Shift, target="lm_head")
    with pytest.raises(MergeError, match=r"lm_head\.weight is tied to embed_tokens\.weight"):
        injection.merge()
    assert model.lm_head.weight is model.embed_tokens.weight


def test_the_one_below_waits_for_the_one_above() -> None:
    model = perceptron()
    one, two = (peftcore.apply(model, Shift, name=name, target="first") for name in ("one", "two"))
    one.merge(), two.merge()
    with pytest.raises(MergeError, match="unmerge 'two' first"):
        one.unmerge()
    two.unmerge(), one.unmerge()
