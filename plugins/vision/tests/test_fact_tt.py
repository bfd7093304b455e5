"""FacT-TT: the conformance kit; numbers of the authors' code; and its equation on image transformers, written a second
time slice by slice, in float64."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fact_equations import (
    HOSTED,
    PATHS,
    apply,
    assert_authors,
    assert_authors_dropout,
    assert_equation,
    assert_refuses_what_has_no_slices,
    image_model,
    in_places,
    small_operators,
    wave,
    wide_model,
)
from torch import Tensor, nn

import peftcore
from peftcore.testing import against, conformance, frozen, same_defaults, same_start

NUMBERS = Path(__file__).parent / "numbers" / "fact_tt.json"
CODE: Any = {"repository": "JieShibo/PETL-ViT", "commit": "026e4f1", "script": "FacT/fact_tt.py"}


@conformance(
    "fact_tt",
    options={"*": {"rank": 3}, "mlp": {"rank": 2}},  # at rank 3 its factors have the shapes of weights there
    expected_failures={
        "the_start_depends_on_seed_and_path-mlp": "slices are as wide as all targets allow: without the first, wider"
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def update(weight: Tensor, U: Tensor, V: Tensor, sigma: Tensor) -> Tensor:
    return in_places(weight, U, V, lambda rows, columns: sigma)


@against("authors", "fact_tt", **CODE)
def test_numbers_of_the_authors_code() -> None:
    operators, steps = small_operators("fact_tt"), {"up": 1.7, "down": 1.9, "q": 3.1, "k": 3.3, "v": 3.7, "out": 3.9}
    with torch.no_grad():
        for name, operator in operators.items():
            operator.sigma.copy_(wave(*operator.sigma.shape, step=steps[name]))
    assert_authors(operators, frozen(NUMBERS))


@pytest.mark.parametrize("name", HOSTED)
def test_equation_on_image_models(name: str) -> None:
    _, width, slices = HOSTED[name]
    assert_equation("fact_tt", name, ("U", "V"), "sigma", update, 2 * width * 3 + slices * 3**2)


@against("authors", "fact_tt", **CODE, part="start")
def test_start() -> None:
    told = frozen(NUMBERS, "start")
    operators = peftcore.apply(wide_model(1), "fact_tt", rank=200).operators
    one = operators["blocks.0.mlp.fc2"]
    found = {"U": one.U.module.weight, "V": one.V.module.weight}
    found |= {name: operators[f"blocks.0.{path}"].sigma for name, path in PATHS.items()}
    assert found.keys() == told.keys()
    for name, each in found.items():
        same_start(each, told[name])


@against("authors", "fact_tt", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The factors, and the head, which `train` names here."""
    told, injection = frozen(NUMBERS, "trains"), peftcore.apply(wide_model(2), "fact_tt", rank=3, train=["head"])
    operators = dict(injection.operators)
    assert [path for path in operators if path.startswith("head")] == ["head", "head.bias"]
    assert told["besides"] == ["head.weight", "head.bias"]
    del operators["head"], operators["head.bias"]
    one = operators["blocks.0.mlp.fc2"]
    factors = [one.U.module.weight.numel(), one.V.module.weight.numel()]
    factors += [operator.sigma.numel() for operator in operators.values()]
    assert sorted(factors) == told["factors"]


@against("authors", "fact_tt", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    """Rank and scale are searched by task in the authors' code; these are those of its default task."""
    injection = peftcore.apply(image_model("vit_tiny_patch16_224")[0], "fact_tt")
    assert_authors_dropout("fact_tt")
    otherwise = {"rank": "16, which nine of their 19 tasks have; this one has 8"}
    otherwise |= {"dropout": "None is theirs where a matrix is called, and 0 where its weight is read"}
    same_defaults(injection.config, frozen(NUMBERS, "defaults"), otherwise)


def test_dropout_is_between_sigma_and_v() -> None:
    """On each of the four parts of a first feed-forward matrix, and on the sum of those of a second."""
    host = nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 6)).double().requires_grad_(False)
    operators = apply(host, "fact_tt", target=["0", "1"], dropout=0.5).operators
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.manual_seed(1)
    ours = host(x)
    torch.manual_seed(1)
    for path, layer in host.named_children():
        operator = operators[path]
        parts = layer.out_features // 6
        low = torch.cat([each @ operator.U.module.weight.T for each in x.split(6, -1)], -1) @ operator.sigma[0].T
        low = low * nn.functional.dropout(torch.ones(5, 3 * parts, dtype=torch.float64), 0.5)
        added = torch.cat([each @ operator.V.module.weight.T for each in low.split(3, -1)], -1)
        x = x @ layer.weight.T + layer.bias + 0.7 * added
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)


def test_start_is_that_of_linear_layers() -> None:
    model, run = image_model("vit_tiny_patch16_224")
    before = run(model)
    operators = peftcore.apply(model, "fact_tt", dtype="float64").operators
    assert torch.equal(run(model), before)
    U, V = (getattr(operators["blocks.0.mlp.fc2"], each).module.weight for each in "UV")
    assert all(operator.U.module.weight is U and operator.V.module.weight is V for operator in operators.values())
    assert 0.9 < U.abs().max() * math.sqrt(24) <= 1
    assert not V.any()
    for end, inputs in (("fc1", 16), ("fc2", 4 * 16)):
        assert 0.9 < operators[f"blocks.0.mlp.{end}"].sigma.abs().max() * math.sqrt(inputs) <= 1


def test_what_has_no_slices_is_refused() -> None:
    assert_refuses_what_has_no_slices("fact_tt")
