"""LoRA-XS beside the authors' code and beside its equation; what is frozen, what a file holds, and how it starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from equation_in_float64 import KINDS, One, adapted, assert_equation, experts, fill
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start

RANK, ALPHA = 3, 5.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
NUMBERS = Path(__file__).parent / "numbers" / "lora_xs.json"
CODE: Any = {
    "repository": "MohammadrezaBanaei/LoRA-XS",
    "commit": "e50b1a8",
    "script": "utils/initialization_utils.py",
}


@conformance("lora_xs", options={"*": {"rank": 4}})  # the default rank is the width of these hosts
def test_conformance(check: Callable[[], None]) -> None:
    check()


@against("authors", "lora_xs", **CODE)
def test_beside_the_authors_code() -> None:
    """Its factors for one layer, what they compute, and what is merged, in float32."""
    numbers = {name: torch.tensor(value) for name, value in frozen(NUMBERS).items()}
    base = One(nn.Linear(4, 3, bias=False)).double()
    weight = torch.tensor([[0.9, -0.4, 0.1, 0.3], [0.2, 0.7, -0.5, 0.1], [-0.3, 0.2, 0.4, 0.6]])
    base.layer.weight.data.copy_(weight)
    injection = peftcore.apply(base, "lora_xs", target="layer", rank=2, alpha=3.0, dtype="float64")
    operator: Any = injection.operators["layer"]
    assert difference(operator.A, numbers["A"]) <= 1e-6
    assert difference(operator.B, numbers["B"]) <= 1e-6
    operator.R.data.copy_(torch.tensor([[0.5, -0.2], [0.3, 0.4]]))
    assert difference(base(torch.tensor([[1.0, 2.0, -1.0, 0.5]]).double()), numbers["output"]) <= 1e-6
    injection.merge()
    assert difference(base.layer.weight, numbers["merged"]) <= 1e-6


@against("authors", "lora_xs", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """The principal part of a weight, all its singular values in A; and R's draw."""
    told, small, large = frozen(NUMBERS, "start"), nn.Linear(5, 6), nn.Linear(200, 200)
    small.weight.data.copy_(torch.arange(1.0, 31).sin().view(6, 5))
    operator: Any = peftcore.apply(One(small), "lora_xs", target="layer", rank=2).operators["layer"]
    same_start(operator.A, told["A"])
    same_start(operator.B, told["B"])
    same_start(peftcore.apply(One(large), "lora_xs", target="layer", rank=200).operators["layer"].R, told["R"])


@against("authors", "lora_xs", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    injection = peftcore.apply(One(nn.Linear(5, 6)), "lora_xs", target="layer", rank=2)
    trained = {name: value.numel() for name, value in injection.operators["layer"].named_parameters()}
    assert frozen(NUMBERS, "trains") == {"0.default_lora_latent_mapping.weight": trained.pop("R")} and not trained


@against("authors", "lora_xs", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(One(nn.Linear(16, 16)), "lora_xs", target="layer")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"), otherwise={"iterations": "exact, not in ten steps"})


def between(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """R between the principal part's factors, found by the eigenvectors of W W', another algorithm."""
    matrix = weight.flatten(1)
    U = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -RANK:].flip(1)
    U = U * (U.gather(0, U.abs().argmax(0, keepdim=True))).sign()
    return weight + ALPHA / RANK * (U @ tensors["R"] @ (U.T @ matrix)).view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    assert_equation(kind, "lora_xs", between, **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_core_alone_trains_and_the_singular_values_stand_in_A(kind: str) -> None:
    operator = adapted(kind, "lora_xs", **OPTIONS)[2]
    assert [name for name, _ in operator.named_parameters()] == ["R"]
    assert 0 < operator.R.abs().max() < 1e-4
    for W, tensors in experts(kind, operator):
        assert difference(tensors["B"].T @ tensors["B"], torch.eye(RANK)) <= 1e-10
        assert difference(tensors["A"].flatten(1).norm(dim=1), torch.linalg.svdvals(W.flatten(1))[:RANK]) <= 1e-10


def test_files_bring_the_factors_that_the_core_was_trained_for(tmp_path: Path) -> None:
    """Even to a base in which the decomposition finds others."""
    host, injection, operator = adapted("linear", "lora_xs", **OPTIONS)
    fill(operator)
    injection.save(tmp_path / "adapter")
    update = operator.merged(torch.zeros_like(host.layer.weight))
    other = One(nn.Linear(12, 7)).double()
    nn.init.uniform_(other.layer.weight)
    loaded: Any = peftcore.load(other, tmp_path / "adapter").operators["layer"]
    assert torch.equal(loaded.merged(torch.zeros_like(host.layer.weight)), update)


def test_options() -> None:
    """A start at nothing, more rank than there is, a fast decomposition; dropout where there is an input to drop."""
    assert not adapted("linear", "lora_xs", std=0.0)[2].R.any()
    assert adapted("linear", "lora_xs", rank=64)[2].R.shape == (7, 7)
    exact, fast = (adapted("linear", "lora_xs", **OPTIONS, iterations=n)[2] for n in (None, 200))
    assert difference(fast.A, exact.A) <= 1e-8
    host = adapted("linear", "lora_xs", **OPTIONS, dropout=0.5)[0].train()
    x = torch.randn(4, 12).double()
    assert not torch.equal(host(x), host(x))
    with pytest.raises(UnsupportedSite, match="dropout"):
        adapted("experts", "lora_xs", dropout=0.5)
