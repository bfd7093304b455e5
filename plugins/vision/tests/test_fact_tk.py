"""FacT-TK: the conformance kit; numbers of the authors' code; and its equation on image transformers, written a second
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
from torch import Tensor

import peftcore
from peftcore.testing import against, conformance, frozen, same_defaults, same_start

NUMBERS = Path(__file__).parent / "numbers" / "fact_tk.json"
CODE: Any = {"repository": "JieShibo/PETL-ViT", "commit": "026e4f1", "script": "FacT/fact_tk.py"}


TOGETHER = "the bound of P's draws is Xavier's for the columns of all sites together, as in the authors' code"
APPLIES = ("mlp", "encoder", "llama", "bert", "t5", "gpt2", "moe", "mistral", "vit", "unet", "dit")


@conformance(
    "fact_tk",
    options={"*": {"rank": 3}, "mlp": {"rank": 2}},  # at rank 3 its factors have the shapes of weights there
    expected_failures={f"the_start_depends_on_seed_and_path-{host}": TOGETHER for host in APPLIES},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def middle(rows: int, columns: int, C: Tensor, P: Tensor) -> Tensor:
    """Sigma [rows * r, columns * r], number by number: the matrices C P are dealt out to the slices as the authors have
    it, along inputs where these have more slices."""
    mixed = torch.einsum("ijk,kt->ijt", C, P)
    rank, many = len(C), max(rows, columns)

    def number(whole: int, dealt: int) -> Tensor:
        """In row `whole` of the dimension that stays whole; `dealt` counts through the slices of the other."""
        few, i = divmod(whole, rank)
        return mixed[i, dealt // many, few * many + dealt % many]

    places = [[(o, i) for i in range(columns * rank)] for o in range(rows * rank)]
    return torch.stack([torch.stack([number(i, o) if rows >= columns else number(o, i) for o, i in p]) for p in places])


def update(weight: Tensor, U: Tensor, V: Tensor, C: Tensor, P: Tensor) -> Tensor:
    return in_places(weight, U, V, lambda rows, columns: middle(rows, columns, C, P))


@against("authors", "fact_tk", **CODE)
def test_numbers_of_the_authors_code() -> None:
    operators = small_operators("fact_tk")
    columns = wave(3, 12, step=2.9).split([1, 1, 1, 1, 4, 4], 1)
    with torch.no_grad():
        for name, P in zip(PATHS, columns, strict=True):
            operators[name].P.copy_(P)
            operators[name].core.module.weight.copy_(wave(3, 3, 3, step=2.3))
    assert_authors(operators, frozen(NUMBERS))


@pytest.mark.parametrize("name", HOSTED)
def test_equation_on_image_models(name: str) -> None:
    _, width, slices = HOSTED[name]
    assert_equation("fact_tk", name, ("U", "V", "core"), "P", update, 2 * width * 3 + 3**3 + slices * 3)


@against("authors", "fact_tk", **CODE, part="start")
def test_start() -> None:
    """P's draw is that of the columns of all sites together, here of twelve blocks, whatever their width is."""
    told = frozen(NUMBERS, "start")
    one = peftcore.apply(wide_model(1), "fact_tk", rank=120).operators["blocks.0.mlp.fc2"]
    model, _ = image_model("vit_tiny_patch16_224", embed_dim=120, depth=12)
    deep = peftcore.apply(model, "fact_tk", rank=120).operators
    found = {"U": one.U.module.weight, "V": one.V.module.weight, "core": one.core.module.weight}
    found["P"] = torch.cat([operator.P for operator in deep.values()], 1)
    assert found.keys() == told.keys()
    for name, each in found.items():
        same_start(each, told[name])


@against("authors", "fact_tk", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The factors, and the head, which `train` names here."""
    told, injection = frozen(NUMBERS, "trains"), peftcore.apply(wide_model(12), "fact_tk", rank=3, train=["head"])
    operators = dict(injection.operators)
    assert [path for path in operators if path.startswith("head")] == ["head", "head.bias"]
    assert told["besides"] == ["head.weight", "head.bias"]
    del operators["head"], operators["head.bias"]
    one = operators["blocks.0.mlp.fc2"]
    factors = [one.U.module.weight.numel(), one.V.module.weight.numel()]
    factors += [operators["blocks.0.mlp.fc2"].core.module.weight.numel(), sum(o.P.numel() for o in operators.values())]
    assert sorted(factors) == told["factors"]


@against("authors", "fact_tk", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    """Rank and scale are searched by task in the authors' code; these are those of its default task."""
    injection = peftcore.apply(image_model("vit_tiny_patch16_224")[0], "fact_tk")
    assert_authors_dropout("fact_tk")
    otherwise = {"rank": "16, which six of their 19 tasks have; this one has 32"}
    otherwise |= {"dropout": "None is theirs where a matrix is called, and 0 where its weight is read"}
    otherwise |= {"scale": "1, the default of their function; this task has 0.1"}
    same_defaults(injection.config, frozen(NUMBERS, "defaults"), otherwise)


def test_start_is_xavier_for_the_core_and_for_all_columns_together() -> None:
    model, run = image_model("vit_tiny_patch16_224")
    before = run(model)
    operators = peftcore.apply(model, "fact_tk", dtype="float64").operators
    assert torch.equal(run(model), before)
    one = operators["blocks.0.mlp.fc2"]
    assert all(each.core is one.core and each.U is one.U and each.V is one.V for each in operators.values())
    assert not one.V.module.weight.any()
    assert 0.9 < one.U.module.weight.abs().max() * math.sqrt(24) <= 1
    assert 0.99 < one.core.module.weight.abs().max() / math.sqrt(6 / (2 * 16 * 16)) <= 1
    assert 0.9 < one.P.abs().max() / math.sqrt(6 / (16 + 24)) <= 1


def test_what_has_no_slices_is_refused() -> None:
    assert_refuses_what_has_no_slices("fact_tk")
