"""QPiSSA beside peft's on bitsandbytes and beside the authors' loop, and its life on packed bases."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_packed import PACKAGES, assert_from_dense, assert_from_packed, fill, host, packed
from equation_in_float64 import KINDS, assert_equation
from peft_pairs import GRADIENTS, MOVED, OUTPUTS, difference
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore.testing import against, conformance, frozen, same_defaults

RANK, ALPHA = 3, 5.0
CODE: Any = {"repository": "GraphPKU/PiSSA", "commit": "87f4db6", "script": "utils/init_qpissa.py"}
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
NUMBERS = Path(__file__).parent / "numbers" / "qpissa.json"
TIES = "with its weights in bfloat16 the singular vectors are others; pissa on all its linear layers fails there alike"


@conformance(
    "qpissa",
    options={"*": {"rank": 2}},
    expected_failures={"low_precision_hosts_keep_their_dtype-t5": TIES},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def rounded(weight: Tensor) -> Tensor:
    """NF4 by bitsandbytes itself, as the authors call it."""
    bnb = pytest.importorskip("bitsandbytes")
    codes = bnb.nn.Params4bit(weight.float(), requires_grad=False, compress_statistics=False, quant_type="nf4").to(
        "cpu"
    )
    return bnb.functional.dequantize_4bit(codes.data, codes.quant_state).float()


@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "qpissa")
@against("bitsandbytes 0.50", "qpissa")
def test_beside_peft() -> None:
    """peft's way: PiSSA on the dense model, what is left in the base is then packed by bitsandbytes; same start, and
    with the same numbers in both, the same outputs and gradients."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=5, init_lora_weights="pissa", target_modules=["0", "2"])
    (model, x), theirs = host(), peft.LoraModel(host()[0], config, "default").model
    injection = peftcore.apply(model, "qpissa", target=["0", "2"], scheme="bnb-nf4", **OPTIONS)
    pairs = []
    for path in ("0", "2"):
        layer, operator = theirs.get_submodule(path), injection.operators[path]
        layer.base_layer.weight.data = rounded(layer.base_layer.weight.data)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert difference(operator.B @ operator.A, B @ A) <= OUTPUTS
        assert difference(operator.A @ operator.A.T, A @ A.T) <= OUTPUTS  # each its half; signs are the machine's
        pairs += [(operator.A, A), (operator.B, B)]
    fill(injection)
    with torch.no_grad():
        for ours, other in pairs:
            other.copy_(ours)
    outputs = [each(x) for each in (model, theirs)]
    assert difference(outputs[0], host()[0](x)) >= MOVED
    assert difference(*outputs) <= OUTPUTS
    for output in outputs:
        output.square().sum().backward()
    assert all(difference(ours.grad, other.grad) <= GRADIENTS for ours, other in pairs)


def iterated(weight: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """The base and the product of the factors, written a second time."""
    gap = weight
    for _ in range(iterations):
        vectors = torch.linalg.eigh(gap.double() @ gap.double().T).eigenvectors  # another way to the best of the rank
        product = (vectors[:, -rank:] @ vectors[:, -rank:].T @ gap.double()).float()
        base = rounded(weight - product)
        gap = weight - base
    return base, product


RECORDED = 3e-5
"""Accepted difference from numbers that were recorded on another processor: singular vectors are float32's."""


@pytest.mark.parametrize("iterations", [1, 5])
@against("authors", "qpissa", **CODE)
def test_what_it_holds_at_first_is_the_authors(iterations: int) -> None:
    """Also how far it is from the weight, which each iteration brings nearer."""
    model, _ = host()
    injection = peftcore.apply(model, "qpissa", target="0", scheme="bnb-nf4", iterations=iterations, **OPTIONS)
    operator, weight = injection.operators["0"], host()[0][0].weight
    base, product = iterated(weight, RANK, iterations)
    assert torch.equal(operator.A, operator.A0)
    assert torch.equal(operator.B, operator.B0)
    numbers, start = frozen(NUMBERS)[str(iterations)], ALPHA / RANK * operator.B @ operator.A
    assert difference(start, product) <= OUTPUTS
    assert difference(start[:2, :6], torch.tensor(numbers["product"])) <= RECORDED
    injection.merge()
    assert difference(model[0].weight, base + product) <= OUTPUTS
    assert difference(model[0].weight[:2, :6], torch.tensor(numbers["weight"])) <= RECORDED
    assert (model[0].weight - weight).norm().item() == pytest.approx(numbers["distance"], rel=OUTPUTS)
    plain, now = (rounded(weight) - weight).norm(), (model[0].weight - weight).norm()
    assert now < (0.95 if iterations == 1 else 0.9) * plain


@against("authors", "qpissa", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Factors up to signs, and what they add, at a scale of 1."""
    model, told = host()[0], {name: torch.tensor(each) for name, each in frozen(NUMBERS, "start").items()}
    (operator,) = peftcore.apply(model, "qpissa", target="0", rank=3, alpha=3.0).operators.values()
    A, B = operator.A[:, :6], operator.B[:4]
    for ours, theirs in ((A.abs(), told["A"].abs()), (B.abs(), told["B"].abs()), (B @ A, told["B"] @ told["A"])):
        assert difference(ours, theirs) <= OUTPUTS


@against("authors", "qpissa", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    sizes: Any = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 9}
    injection = peftcore.apply(LlamaForCausalLM(LlamaConfig(hidden_size=8, **sizes)), "qpissa", rank=2)
    trained = {
        f"{path}.lora_{name}.default.weight": value.numel()
        for path, operator in injection.operators.items()
        for name, value in operator.named_parameters()
    }
    assert trained == frozen(NUMBERS, "trains")


@against("authors", "qpissa", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    """Also the scale of one."""
    config = peftcore.apply(nn.Sequential(nn.Linear(64, 64)), "qpissa", target="0").config
    told, small = frozen(NUMBERS, "defaults"), "an eighth of theirs, which fits smaller models and memory"
    same_defaults(config, told, otherwise={"rank": small, "alpha": f"the rank, as theirs is: {small}"})
    assert config.alpha == config.rank and told["alpha"] == told["rank"]


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """On all kinds of layers; int8 rounds each row of the whole matrix."""

    def changed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        scale = ALPHA / RANK
        rest = weight.detach() - scale * (tensors["B0"] @ tensors["A0"].flatten(1)).view(weight.shape)
        unit = rest.float().flatten(1).abs().amax(1).view(-1, *[1] * (rest.dim() - 1)) / 127
        rest = ((rest.float() / unit).round() * unit).double()
        return rest + scale * (tensors["B"] @ tensors["A"].flatten(1)).view(weight.shape)

    assert_equation(kind, "qpissa", changed, scheme="int8", **OPTIONS)


@pytest.mark.parametrize("scheme", PACKAGES)
def test_from_a_dense_base(scheme: str, tmp_path: Path) -> None:
    assert_from_dense(scheme, "qpissa", tmp_path, iterations=2, **OPTIONS)


@pytest.mark.parametrize("scheme", PACKAGES)
def test_from_a_packed_base(scheme: str, tmp_path: Path) -> None:
    """The principal part of what it holds trains."""
    fresh = assert_from_packed(scheme, "qpissa", tmp_path, **OPTIONS)
    held, operator = packed(scheme)[0], fresh.operators["0"]
    weight = peftcore.registry.plugins.layer_of(held, "weight").read(held, "weight").double()
    vectors = torch.linalg.eigh(weight @ weight.T).eigenvectors[:, -RANK:]
    assert difference(ALPHA / RANK * operator.B0 @ operator.A0, vectors @ vectors.T @ weight) <= OUTPUTS


def test_a_rank_beyond_the_weight() -> None:
    """All of the weight trains, and nothing is left to pack."""
    model = nn.Sequential(nn.Linear(12, 7))
    weight = model[0].weight.detach().clone()
    injection = peftcore.apply(model, "qpissa", target="0", rank=9, alpha=9.0)
    assert injection.operators["0"].A.shape == (9, 12)
    injection.merge()
    assert difference(model[0].weight, weight) <= OUTPUTS
