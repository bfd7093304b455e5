"""Parts of the host that the user names in `train`: replacements that are saved with the injection."""

from typing import Any

import pytest
import torch
from core_toys import TiedLanguageModel, token_ids, transformer
from torch import nn

import peftcore


def test_trained_head_is_a_replacement_saved_with_the_injection() -> None:
    model, ids = transformer(), token_ids()
    base, weight = model(ids), model.classifier.weight.detach().clone()
    injection = peftcore.apply(model, "lora", train=["classifier"])
    assert {"classifier.value", "classifier.bias.value"} <= set(injection.state_dict())
    assert torch.equal(model(ids), base)
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.5)
    model(ids).square().sum().backward()
    optimizer.step()
    head = injection.operators["classifier"].value
    assert not torch.equal(head, weight) and torch.equal(model.classifier.weight, weight)
    assert not torch.allclose(model(ids), base, atol=1e-2)
    with injection.disabled():
        assert torch.equal(model(ids), base)


@pytest.mark.parametrize("train", ["classifier", ("classifier",), ["classifier"], ["*classifier"], ["head"]], ids=str)
def test_spellings_of_train(train: Any) -> None:
    injection = peftcore.apply(transformer(), "lora", train=train)
    assert {path for path in injection.operators if "attn" not in path} == {"classifier", "classifier.bias"}


def test_train_names_single_parameters_and_whole_parts() -> None:
    injection = peftcore.apply(transformer(), "lora", train=["classifier.bias", "layers.1.mlp"])
    extra = [path for path in injection.operators if "attn." not in path]
    assert extra == [
        "classifier.bias",
        "layers.1.mlp.up_proj",
        "layers.1.mlp.up_proj.bias",
        "layers.1.mlp.down_proj",
        "layers.1.mlp.down_proj.bias",
    ]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("classifier.weight", ["classifier"]),
        ("*.mlp_norm.bias", ["layers.0.mlp_norm.bias", "layers.1.mlp_norm.bias"]),
        ("layers.0.mlp_norm", ["layers.0.mlp_norm", "layers.0.mlp_norm.bias"]),
        ("norm.final", ["norm", "norm.bias"]),
    ],
)
def test_train_trains_what_it_names_and_no_more(train: str, expected: list[str]) -> None:
    injection = peftcore.apply(transformer(), "lora", train=train)
    assert [path for path in injection.operators if "attn." not in path] == expected


def test_exclude_does_not_reach_what_train_names() -> None:
    model = nn.ModuleDict({"inner": transformer()})
    injection = peftcore.apply(
        model, "lora", target=nn.Linear, exclude=["classifier", "layers.1"], train=["classifier"]
    )
    assert {path for path in injection.operators if "layers" not in path} == {
        "inner.classifier",
        "inner.classifier.bias",
    }


def test_tied_weight_has_one_value_for_all_its_holders() -> None:
    model, ids = TiedLanguageModel(), token_ids()
    base = model(ids)
    injection = peftcore.apply(model, "lora", target="inner", train=["lm_head"])
    assert [path for path in injection.operators if path != "inner"] == ["lm_head"]
    value = injection.operators["lm_head"].value
    with torch.no_grad():
        value.mul_(2)
    inner = torch.tanh(model.inner(model.embed_tokens(ids)))
    assert torch.equal(model.embed_tokens(ids), nn.functional.embedding(ids, value))
    assert torch.allclose(model(ids), nn.functional.linear(inner, value))
    assert not torch.allclose(model(ids), base, atol=1e-3)
    assert model.lm_head.weight is model.embed_tokens.weight
    injection.remove()
    assert torch.equal(model(ids), base)


def test_both_ends_of_a_tie_named_in_train_share_one_value() -> None:
    injection = peftcore.apply(TiedLanguageModel(), "lora", target="inner", train=["lm_head", "embed_tokens"])
    assert len([path for path in injection.operators if path != "inner"]) == 1
