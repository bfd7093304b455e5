"""MoLoRA: the kit; numbers of the authors' module; the equation in a model, by hooks."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import NotMergeable
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "molora_moe.json"
CODE: Any = {"repository": "for-ai/parameter-efficient-moe", "commit": "e2683fe", "script": "src/molora.py"}


@conformance("molora_moe", options={"*": {"experts": 3, "rank": 2}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(0), sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


@against("authors", "molora_moe", **CODE)
def test_numbers_of_the_authors() -> None:
    """What is added, and the gradients; their numbers are of float32."""
    model = nn.Sequential(nn.Linear(5, 4, bias=False)).double().eval()
    model[0].weight.data.zero_()
    injection = peftcore.apply(model, "molora_moe", target="0", experts=3, rank=2, dtype="float64")
    op: Any = injection.operators["0"]
    with torch.no_grad():
        op.A.copy_(wave(3, 2, 5, step=1.7))
        op.B.copy_(wave(3, 4, 2, step=2.3))
        op.router.copy_(wave(3, 5, step=0.7))
    y = model(wave(1, 2, 5, step=0.9))
    (y * wave(1, 2, 4, step=0.3)).sum().backward()
    found = {"y": y, "A": op.A.grad, "B": op.B.grad, "router": op.router.grad}
    numbers = frozen(NUMBERS)
    assert numbers.keys() == found.keys()
    for name, value in found.items():
        assert difference(value.flatten(), torch.tensor(numbers[name], dtype=torch.float64)) < 1e-5, name


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_equation(name: str) -> None:
    """By hooks on a copy of the host, an expert at a time."""
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    base = model.double().eval()
    model, plain = deepcopy(base), base(**inputs).logits
    injection = peftcore.apply(model, "molora_moe", experts=3, rank=2, dtype="float64")
    fill(injection)
    for site in injection.sites:
        op: Any = injection.operators[site.path]
        start, stop = site.slices[0] if site.slices else (0, site.out_features)

        def add(m: Any, args: Any, y: Tensor, op: Any = op, at: slice = slice(start, stop)) -> Tensor:
            shares = (args[0] @ op.router.T).exp()
            shares = shares / shares.sum(-1, keepdim=True)
            added = sum(8 * shares[..., e, None] * (args[0] @ op.A[e].T @ op.B[e].T) for e in range(3))
            return torch.cat([y[..., : at.start], y[..., at] + added, y[..., at.stop :]], -1)

        base.get_submodule(site.module_path).register_forward_hook(add)
    expected = base(**inputs).logits
    assert difference(expected, plain) > 1e-2
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-9, atol=1e-9)


@against("authors", "molora_moe", **CODE, part="start")
def test_start_is_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(2000, 4)), "molora_moe", target="0", experts=20, rank=2)
    for name, told in frozen(NUMBERS, "start").items():
        same_start(getattr(injection.operators["0"], name), told)


@against("authors", "molora_moe", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    op = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "molora_moe", target="0", experts=3, rank=2).operators["0"]
    trained = {name: each.numel() for name, each in op.named_parameters() if each.requires_grad}
    assert trained == frozen(NUMBERS, "trains")


@against("authors", "molora_moe", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "molora_moe", target="0")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


def test_it_does_not_merge() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "molora_moe", target="0")
    with pytest.raises(NotMergeable):
        injection.merge()
