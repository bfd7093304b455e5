"""HydraLoRA: the kit; numbers of the authors' own layer, whose softmax is in float32; the equation in float64 for
several kinds of layers."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_of_layers import LAYERS, OneLayer
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import NotMergeable, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

HEADS, RANK, ALPHA = 3, 2, 3.0
OPTIONS = {"target": "0", "heads": HEADS, "rank": RANK, "alpha": ALPHA, "dropout": 0.0}
NUMBERS = Path(__file__).parent / "numbers" / "hydralora.json"
CODE: Any = {"repository": "Clin0212/HydraLoRA", "commit": "afb693b", "script": "HydraLoRA/peft/tuners/lora.py"}


@conformance("hydralora", options={"*": {"heads": HEADS, "rank": RANK}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(0), sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


@against("authors", "hydralora", **CODE)
def test_numbers_of_the_authors() -> None:
    """The output, then the gradients."""
    model = nn.Sequential(nn.Linear(5, 4)).double().eval()
    injection = peftcore.apply(model, "hydralora", **OPTIONS, dtype="float64")
    (op,) = injection.operators.values()
    with torch.no_grad():
        model[0].weight.copy_(wave(4, 5, step=1.1))
        model[0].bias.copy_(wave(4, step=1.3))
        op.A.copy_(wave(2, 5, step=1.7))
        op.gate.copy_(wave(3, 5, step=0.7))
        op.B.copy_(wave(3, 4, 2, step=2.3))
    x = wave(1, 2, 5, step=0.9)
    y = model(x)
    (y * wave(1, 2, 4, step=0.3)).sum().backward()
    with injection.disabled():
        assert difference(model(x), y) > 1e-3
    numbers = frozen(NUMBERS)
    for name, found in {"y": y, "A": op.A.grad, "B": op.B.grad, "gate": op.gate.grad}.items():
        assert difference(found.flatten(), torch.tensor(numbers[name], dtype=torch.float64)) < 1e-6, name


@against("authors", "hydralora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(2000, 3)), "hydralora", target="0", heads=20, rank=20)
    for name, told in frozen(NUMBERS, "start").items():
        same_start(getattr(injection.operators["0"], name), told)


@against("authors", "hydralora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    op = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "hydralora", **OPTIONS).operators["0"]
    assert {name: each.numel() for name, each in op.named_parameters() if each.requires_grad} == frozen(
        NUMBERS, "trains"
    )


@against("authors", "hydralora", **CODE, part="defaults")
def test_defaults_are_those_of_the_authors_script() -> None:
    """Also the matrices of the feed-forward. (fine-tuning.py itself has a rank of 8, 2 heads and a dropout of 0.1.)"""
    injection = peftcore.apply(HOSTS["llama"].build()[0], "hydralora")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))
    assert {path.rpartition(".")[2] for path in injection.operators} == {"gate_proj", "down_proj", "up_proj"}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_equation(kind: str) -> None:
    """Each head as a layer of its own, with its effective weight; their changes weighted position by position."""
    host = OneLayer(kind)
    x, channels, model = host.x, host.channels, deepcopy(host.model)
    injection = peftcore.apply(model, "hydralora", **OPTIONS, dtype="float64")
    fill(injection)
    (op,) = injection.operators.values()
    plain = host.model(x)

    shares = host.with_weight(op.gate.detach()).exp()
    shares = shares / shares.sum(-1, keepdim=True)
    heads = [host.with_weight(torch.einsum("or,r...->o...", B, op.A).detach()) for B in op.B]
    expected = plain.movedim(channels, -1) + ALPHA / RANK * sum(shares[..., e, None] * heads[e] for e in range(HEADS))
    assert difference(model(x), plain) > 1e-3
    torch.testing.assert_close(model(x).movedim(channels, -1), expected, rtol=1e-10, atol=1e-10)


def test_each_head_drops_for_itself_and_the_gate_does_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8)).double()
    x = torch.randn(5, 12).double()
    plain = model(x)
    injection = peftcore.apply(model, "hydralora", **{**OPTIONS, "dropout": 0.5}, dtype="float64")
    fill(injection)
    (op,) = injection.operators.values()
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    shares = (x @ op.gate.T).softmax(-1)
    heads = [nn.functional.dropout(x, 0.5) @ op.A.T @ B.T for B in op.B]
    expected = plain + ALPHA / RANK * sum(shares[:, e : e + 1] * heads[e] for e in range(HEADS))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_how_it_starts_and_what_it_cannot_do() -> None:
    model = nn.Sequential(nn.Embedding(20, 100))
    ids = torch.arange(20)
    before = model(ids)
    injection = peftcore.apply(model, "hydralora", **OPTIONS)
    (op,) = injection.operators.values()
    assert torch.equal(model(ids), before) and not op.A.any() and op.B.std() > 0.8
    with pytest.raises(NotMergeable):
        injection.merge()
    injection.remove()
    with pytest.raises(UnsupportedSite, match="dropout=0"):
        peftcore.apply(model, "hydralora", target="0")
