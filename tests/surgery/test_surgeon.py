"""The verbs of a method's `inject`: grafts, seeds, and parts of the host that train along."""

import copy
from typing import Any

import pytest
import torch
from core_toys import (
    ALL,
    BreakingOperator,
    Fragile,
    Shift,
    ShiftOperator,
    TiedLanguageModel,
    perceptron,
    snapshot,
    token_ids,
    transformer,
)
from torch import nn

import peftcore
from peftcore.author import Site
from peftcore.errors import (
    PluginError,
)


def test_method_that_grafts_a_site_twice_is_told_so() -> None:
    class Twice(peftcore.author.Method):
        name = "toy_twice"
        Config = Shift.Config
        tags = Shift.tags
        target = "attn.q"

        def inject(self, model: Any, config: Any, surgeon: Any) -> None:
            for site in surgeon.sites() + surgeon.sites():
                surgeon.graft(site, BreakingOperator, Fragile(stage="none"))

        @staticmethod
        def parameter_count(site: Any, config: Any) -> int:
            return 0

    model = transformer()
    before = snapshot(model)
    with pytest.raises(PluginError, match="twice"):
        peftcore.apply(model, Twice)
    assert snapshot(model) == before


def test_operators_are_drawn_from_seed_and_path_and_the_global_generator_does_not_move() -> None:
    before = torch.get_rng_state()
    one = peftcore.apply(transformer(), "lora", seed=5)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    two = peftcore.apply(transformer(), "lora", seed=5, target=["attn.v", "attn.k", "attn.q"])
    torch.set_rng_state(before)
    other = peftcore.apply(transformer(), "lora", seed=6)
    assert not torch.equal(state, before)
    for path, operator in one.operators.items():
        assert torch.equal(operator.A, two.operators[path].A)
        assert not torch.equal(operator.A, other.operators[path].A)
    assert not torch.equal(one.operators["layers.0.self_attn.q_proj"].A, one.operators["layers.1.self_attn.q_proj"].A)


def test_global_generator_does_not_move() -> None:
    torch.manual_seed(3)
    model = transformer()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    for method in ALL:
        peftcore.apply(model, method)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_torchs_own_decides() -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = perceptron()
        torch.manual_seed(seed)
        drawn.append(peftcore.apply(model, "lora", target="first").operators["first"].A)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_building_many_operators_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.total, self.done, self.open = 0, 0, True
            self.delay = options["delay"]
            shown.append(self)

        def update(self) -> None:
            self.done += 1

        def close(self) -> None:
            self.open = False

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    peftcore.plan(model, "lora", target=nn.Linear)
    assert not shown
    injection = peftcore.apply(model, "lora", target=nn.Linear)
    (bar,) = shown
    assert (bar.total, bar.done, bar.open, bar.delay > 0) == (5, 5, False, True)
    copy.deepcopy(injection.model)


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


def test_an_operator_is_given_the_keywords_of_its_graft() -> None:
    class Told(ShiftOperator):
        def __init__(self, site: Site, config: Any, *, by: float, name: str = "") -> None:
            super().__init__(site, config)
            self.by, self.called = by, name

    class Telling(peftcore.author.Method):
        name, target = "toy_telling", "attn.q"
        Config, tags = Shift.Config, Shift.tags

        def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
            for number, site in enumerate(surgeon.sites()):
                surgeon.graft(site, Told, config, by=float(number), name=site.path)

        @staticmethod
        def parameter_count(site: Any, config: Any) -> int:
            return 0

    injection = peftcore.apply(transformer(), Telling)
    found = [(each.by, each.called) for each in injection.operators.values()]
    assert found == [(float(number), path) for number, path in enumerate(injection.operators)]
