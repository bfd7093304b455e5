"""LQ-LoRA beside the authors' code, and its life on packed bases."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_packed import PACKAGES, assert_from_dense, assert_from_packed, host, packed
from equation_in_float64 import KINDS, assert_equation
from peft_pairs import OUTPUTS, difference
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore.registry.plugins import layer_of
from peftcore.testing import against, conformance, frozen, same_defaults, same_start

RANK, ALPHA = 3, 5.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
TIES = "with its weights in bfloat16 the singular vectors of random weights are others"


# In 4 bits another iterate is the nearest one when the weights are in bfloat16, and its directions are others.
@conformance(
    "lq_lora",
    options={"*": {"rank": 2, "scheme": "int8"}},
    expected_failures={f"low_precision_hosts_keep_their_dtype-{each}": TIES for each in ("t5", "mistral", "unet")},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def iterates(weight: Tensor, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Low-rank part and base in turns, written a second time: another decomposition, and NF4 by bitsandbytes itself."""
    bnb = pytest.importorskip("bitsandbytes")
    base = torch.zeros_like(weight)
    while True:
        gap = (weight - base).double()
        vectors = torch.linalg.eigh(gap @ gap.T).eigenvectors[:, -rank:]
        product = (vectors @ vectors.T @ gap).float()
        codes = bnb.nn.Params4bit(weight - product, requires_grad=False, compress_statistics=False, quant_type="nf4")
        codes = codes.to("cpu")
        base = bnb.functional.dequantize_4bit(codes.data, codes.quant_state).float()
        yield product, base


def started(iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weight, the low-rank part at first, and the effective weight."""
    model, _ = host()
    weight = model[0].weight.clone()
    injection = peftcore.apply(model, "lq_lora", target="0", scheme="bnb-nf4", iterations=iterations, **OPTIONS)
    operator = injection.operators["0"]
    assert torch.equal(operator.A, operator.A0)
    assert torch.equal(operator.B, operator.B0)
    A, B = operator.A.detach(), operator.B.detach()
    assert difference(A @ A.T, (B.T @ B)) <= OUTPUTS  # half of the singular values each
    injection.merge()
    return weight, ALPHA / RANK * B @ A, model[0].weight


CODE: Any = {"repository": "HanGuo97/lq-lora", "commit": "c2424b3", "script": "models/lq_utils.py"}
NUMBERS = Path(__file__).parent / "numbers" / "lq_lora.json"


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 5, 6, 8])
@against("authors", "lq_lora", **CODE)
def test_the_distances_are_the_authors(iterations: int) -> None:
    weight, product, effective = started(iterations)
    for _, (low, base) in zip(range(iterations), iterates(weight, RANK), strict=False):
        wanted = low, low + base
    assert difference(product, wanted[0]) <= OUTPUTS
    assert difference(effective, wanted[1]) <= OUTPUTS
    assert abs((weight - effective).norm().item() / frozen(NUMBERS)[str(iterations)] - 1) <= OUTPUTS


@against("authors", "lq_lora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Factors up to signs, and what they add, at a scale of 1: of the first iterate, which takes the weight apart."""
    model = host()[0].double()
    told = {name: torch.tensor(each, dtype=torch.float64) for name, each in frozen(NUMBERS, "start").items()}
    options: dict[str, Any] = {"target": "0", "rank": 3, "alpha": 3.0, "iterations": 1, "dtype": "float64"}
    (operator,) = peftcore.apply(model, "lq_lora", **options).operators.values()
    A, B = operator.A[:, :6], operator.B[:4]
    same_start(A.abs(), told["A"].abs().tolist())
    same_start(B.abs(), told["B"].abs().tolist())
    same_start(B @ A, (told["B"] @ told["A"]).tolist())


@against("authors", "lq_lora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    sizes: Any = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 9}
    injection = peftcore.apply(LlamaForCausalLM(LlamaConfig(hidden_size=8, **sizes)), "lq_lora", rank=2, iterations=1)
    trained = {
        f"{path}.lora_{name}.default.weight": value.numel()
        for path, operator in injection.operators.items()
        for name, value in operator.named_parameters()
    }
    assert trained == frozen(NUMBERS, "trains")


@against("authors", "lq_lora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(nn.Sequential(nn.Linear(64, 64)), "lq_lora", target="0").config
    few = "decompositions are exact and cost more, and little is gained after the first few iterations"
    same_defaults(config, frozen(NUMBERS, "defaults"), otherwise={"iterations": few})


def test_it_takes_the_iterate_before_the_distance_rises() -> None:
    weight, product, effective = started(100)
    found, least = weight, float("inf")
    for low, base in iterates(weight, RANK):
        if (distance := (weight - low - base).norm().item()) > least:
            break
        found, least = low, distance
    assert difference(product, found) <= OUTPUTS
    assert abs((weight - effective).norm().item() / least - 1) <= OUTPUTS
    assert abs(least / 0.5014206 - 1) <= OUTPUTS
    assert abs(distance / 0.5014461 - 1) <= OUTPUTS


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """On all kinds of layers; int8 rounds each row of the whole matrix."""

    def changed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        scale = ALPHA / RANK
        rest = weight.detach() - scale * (tensors["B0"] @ tensors["A0"].flatten(1)).view(weight.shape)
        unit = rest.float().flatten(1).abs().amax(1).view(-1, *[1] * (rest.dim() - 1)) / 127
        rest = ((rest.float() / unit).round() * unit).double()
        return rest + scale * (tensors["B"] @ tensors["A"].flatten(1)).view(weight.shape)

    assert_equation(kind, "lq_lora", changed, scheme="int8", **OPTIONS)


@pytest.mark.parametrize("scheme", PACKAGES)
def test_from_a_dense_base(scheme: str, tmp_path: Path) -> None:
    assert_from_dense(scheme, "lq_lora", tmp_path, **OPTIONS)


@pytest.mark.parametrize("scheme", PACKAGES)
def test_from_a_packed_base(scheme: str, tmp_path: Path) -> None:
    """The principal part of what it holds trains."""
    fresh = assert_from_packed(scheme, "lq_lora", tmp_path, **OPTIONS)
    held, operator = packed(scheme)[0], fresh.operators["0"]
    weight = layer_of(held, "weight").read(held, "weight").double()
    vectors = torch.linalg.eigh(weight @ weight.T).eigenvectors[:, -RANK:]
    assert difference(ALPHA / RANK * operator.B0 @ operator.A0, vectors @ vectors.T @ weight) <= OUTPUTS
