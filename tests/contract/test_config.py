"""Options: strict, immutable, described; an error names method, field, value and rule."""

import json
from typing import Any

import pytest
import torch
from core_toys import perceptron, transformer
from pydantic import ValidationError

import peftcore
from peftcore.author import MethodConfig
from peftcore.contract.config import validate, validate_json
from peftcore.errors import ConfigError


def config(name: str, **options: Any) -> Any:
    return peftcore.method(name).Config(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": True}, ["lora", "rank", "True", "integer"]),
        ({"rank": "8"}, ["lora", "rank", "'8'", "integer"]),
        ({"rank": 8.0}, ["lora", "rank", "8.0", "integer"]),
        ({"rank": 0}, ["lora", "rank", "0", "greater than 0"]),
        ({"rank": -3}, ["lora", "rank", "-3", "greater than 0"]),
        ({"rank": None}, ["lora", "rank", "None", "integer"]),
        ({"alpha": float("nan")}, ["lora", "alpha", "nan", "finite"]),
        ({"alpha": float("inf")}, ["lora", "alpha", "inf", "finite"]),
        ({"alpha": -1.0}, ["lora", "alpha", "-1.0", "greater than 0"]),
        ({"alpha": "16"}, ["lora", "alpha", "'16'", "number"]),
        ({"alpha": 10**400}, ["lora", "alpha", "1000"]),
        ({"rank": 2**63}, ["lora", "9223372036854775808"]),
        ({"overrides": {"*": {"rank": 2**63}}}, ["lora", "9223372036854775808"]),
        ({"dropout": 1.0}, ["lora", "dropout", "1.0", "less than 1"]),
        ({"rnak": 8}, ["lora", "'rnak'", "did you mean 'rank'"]),
        ({"zzz": 8}, ["lora", "'zzz'", "alpha, damping, dropout", "rank"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_option_names_method_field_value_and_rule(options: dict[str, Any], words: list[str]) -> None:
    model = perceptron()
    before = list(model.state_dict())
    with pytest.raises(ConfigError) as caught:
        peftcore.apply(model, "lora", target="first", **options)
    for word in words:
        assert word in str(caught.value)
    assert list(model.state_dict()) == before and peftcore.injections(model) == {}


def test_one_error_tells_of_all_wrong_options() -> None:
    with pytest.raises(ConfigError) as caught:
        peftcore.apply(perceptron(), "lora", target="first", rank=0, alpha=-1.0, dorpout=0.1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("lora") for line in lines)


def test_integers_are_fine_where_a_number_is_wanted() -> None:
    injection = peftcore.apply(perceptron(), "lora", target="first", alpha=16)
    assert injection.config.alpha == 16.0


def test_replace_gives_a_checked_copy() -> None:
    first = config("lora", rank=4)
    second = first.replace(rank=16)
    assert (first.rank, second.rank, second.alpha) == (4, 16, first.alpha)
    assert second.model_fields_set == {"rank"}
    with pytest.raises(ConfigError, match=r"rank.*greater than 0"):
        first.replace(rank=0)
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        first.replace(rnk=2)
    with pytest.raises(ConfigError, match="lora: method='dora'"):
        first.replace(method="dora")


@pytest.mark.parametrize("field", ["rank", "method", "overrides", "something_new"])
def test_configs_are_immutable(field: str) -> None:
    made = config("lora")
    with pytest.raises(ValidationError):
        setattr(made, field, 4)


def test_overrides_set_the_rank_by_pattern() -> None:
    model = transformer()
    injection = peftcore.apply(model, "lora", rank=2, overrides={"layers.0.*": {"rank": 5}, "layers.*": {"alpha": 1.0}})
    ranks = {path: operator.A.shape[0] for path, operator in injection.operators.items()}
    scales = {path: operator.scale for path, operator in injection.operators.items()}
    first, second = "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"
    assert (ranks[first], ranks[second]) == (5, 2)
    assert (scales[first], scales[second]) == (8.0 / 5, 1.0 / 2)  # the first pattern that matches counts alone


class Paired(MethodConfig):
    method: str = "paired"
    pair: tuple[int, int] = (1, 1)


def test_a_list_stands_for_a_tuple_where_one_is_asked_for() -> None:
    """YAML, flags and JSON have lists alone; elsewhere a list stays one, and a wrong one is named."""
    model = transformer()
    assert peftcore.method("st_adapter").Config().kernel == (3, 1, 1)
    found = validate(peftcore.method("st_adapter").Config, {"kernel": [1, 3, 3]})
    assert found.kernel == (1, 3, 3)
    assert validate(peftcore.method("mona").Config, {"grid": [4, 5]}).grid == (4, 5)
    with pytest.raises(ConfigError, match="kernel"):
        validate(peftcore.method("st_adapter").Config, {"kernel": [1, 3]})
    with pytest.raises(ConfigError, match="rank"):
        peftcore.apply(model, "lora", rank=[8])


def test_a_list_in_a_file_is_the_tuple_it_was() -> None:
    """For the options themselves and for those of single sites, which are not read until a site asks."""
    before = Paired(pair=(2, 3), overrides={"first": {"pair": (4, 5)}})
    after = validate_json(Paired, before.model_dump_json())
    assert after.pair == (2, 3)
    assert before.at("first").pair == after.at("first").pair == (4, 5)
    assert after.at("second").pair == (2, 3)


def test_plan_knows_overrides() -> None:
    plan = peftcore.plan(transformer(), "lora", rank=2, overrides={"*.q_proj": {"rank": 5}})
    assert plan.shapes["layers.0.self_attn.q_proj.A"] == (5, 8)
    assert plan.shapes["layers.0.self_attn.v_proj.A"] == (2, 8)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"layers.0.*": {"rank": 0}}, ["rank", "greater than 0"]),
        ({"layers.0.*": {"rnak": 4}}, ["did you mean 'rank'"]),
        ({"layers.0.*": 4}, ["overrides"]),
        (["layers.0.*"], ["overrides"]),
        ({"layers.0.*": {"method": "dora"}}, ["method", "'dora'"]),
    ],
    ids=str,
)
def test_bad_override_is_an_error_and_changes_nothing(overrides: Any, words: list[str]) -> None:
    model = transformer()
    before = list(model.state_dict())
    with pytest.raises(ConfigError) as caught:
        peftcore.apply(model, "lora", overrides=overrides)
    assert all(word in str(caught.value) for word in words)
    assert list(model.state_dict()) == before


def test_bad_override_is_an_error_even_where_nothing_matches_it() -> None:
    """A misspelled option must not pass in silence because its pattern is misspelled too."""
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        peftcore.apply(transformer(), "lora", overrides={"no.such.site": {"rnak": 4}})


def test_override_that_matches_no_site_is_reported() -> None:
    with pytest.warns(UserWarning, match=r"layres\.0"):
        peftcore.apply(transformer(), "lora", overrides={"layres.0.*": {"rank": 4}})


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_of_operators(dtype: Any, expected: torch.dtype) -> None:
    injection = peftcore.apply(perceptron(), "lora", target="first", dtype=dtype)
    assert {parameter.dtype for parameter in injection.parameters()} == {expected}


@pytest.mark.parametrize("dtype", ["int8", torch.int64, "flaot32", 32], ids=str)
def test_dtype_that_cannot_train_is_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        peftcore.apply(perceptron(), "lora", target="first", dtype=dtype)


class SharedConfig(MethodConfig):
    """Options of a method whose sites share a matrix."""

    overridable = ("scale", "dropout")

    method: str = "sharing"
    rank: int = 4
    scale: float = 1.0
    dropout: float = 0.0


class OneConfig(SharedConfig):
    """Options of a method that has one network for all sites."""

    overridable = ()


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            SharedConfig,
            {"rank": 2},
            ["sharing", "rank cannot change at single sites", "overrides can change scale and dropout"],
        ),
        (SharedConfig, {"scale": 2.0, "rank": 2}, ["rank cannot change"]),
        (SharedConfig, {"overrides": {}}, ["overrides cannot change"]),
        (OneConfig, {"scale": 2.0}, ["scale cannot change at single sites", "the method takes no overrides"]),
    ],
)
def test_an_override_of_an_option_that_sites_share_is_refused(
    kind: type[MethodConfig], changes: dict[str, Any], words: list[str]
) -> None:
    for made in (lambda options: validate(kind, options), lambda options: validate_json(kind, json.dumps(options))):
        with pytest.raises(ConfigError) as caught:
            made({"overrides": {"*": changes}})
        assert all(word in str(caught.value) for word in words)


def test_other_overrides_are_taken() -> None:
    config = validate(SharedConfig, {"overrides": {"a": {"scale": 2.0}, "*": {}}})
    assert (config.at("a").scale, config.at("b").scale) == (2.0, 1.0)
    assert validate(OneConfig, {"overrides": {"*": {}}}).at("a").rank == 4
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        validate(OneConfig, {"overrides": {"*": {"scael": 2.0}}}).at("a")


@pytest.mark.parametrize(
    ("name", "changes"),
    [("pal", {"width": 2}), ("vqt", {"length": 2}), ("arc", {"bottleneck": 2}), ("k_adapter", {"width": 2})],
)
def test_methods_whose_sites_share_parameters_declare_it(name: str, changes: dict[str, Any]) -> None:
    """Refused before anything of the model is looked at, and in the options of a preset too."""
    with pytest.raises(ConfigError, match="cannot change at single sites"):
        validate(peftcore.method(name).Config, {"overrides": {"*": changes}})
