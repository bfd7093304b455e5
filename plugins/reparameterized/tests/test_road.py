"""RoAd beside peft's, and beside its equation as one matrix on the layers that peft lacks."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import LAYERS, copies, frozen, merged_experts
from one_layer import One
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from torch.func import functional_call
from two_layers import Two

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
EXACT = 1e-12
VARIANTS = pytest.mark.parametrize("variant", [1, 2, 4])


@conformance("road")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@conformance("road", hosts=["llama"], options={"llama": {"variant": 4, "group_size": 8}})
def test_conformance_of_free_entries(check: Callable[[], None]) -> None:
    check()


def matrix(angle: Tensor, length: Tensor, variant: int, group_size: int) -> Tensor:
    """R [out, out], entry by entry."""
    out = 2 * len(angle) // variant
    half = group_size // 2
    R = torch.zeros(out, out, dtype=angle.dtype)
    for group in range(out // group_size):
        for place in range(half):
            first = group * group_size + place
            second = first + half
            pair = group * half + place
            if variant == 1:
                of = {"11": pair, "12": pair, "21": pair, "22": pair}
            elif variant == 2:
                of = {"11": first, "12": first, "21": second, "22": second}
            else:
                start = 2 * group * group_size + place
                of = {"11": start, "22": start + half, "12": start + group_size, "21": start + group_size + half}
            R[first, first] = length[of["11"]] * angle[of["11"]].cos()
            R[first, second] = -length[of["12"]] * angle[of["12"]].sin()
            R[second, first] = length[of["21"]] * angle[of["21"]].sin()
            R[second, second] = length[of["22"]] * angle[of["22"]].cos()
    return R


def moved(operator: Any) -> None:
    with torch.no_grad():
        operator.angle.add_(torch.randn_like(operator.angle) * 0.3)
        operator.length.add_(torch.randn_like(operator.length) * 0.3)


@VARIANTS
@pytest.mark.parametrize(("name", "group_size"), [("conv2d", 2), ("conv2d", 6), ("grouped", 2), ("transposed", 6),
                                                  ("embedding", 2), ("embedding", 4), ("embedding", 8)])  # fmt: skip
def test_equation(name: str, group_size: int, variant: int) -> None:
    """Outputs, gradients, and the merged weight and bias."""
    base, x = frozen(*LAYERS[name])
    options = {"target": "layer", "variant": variant, "group_size": group_size, "dtype": "float64"}
    injection = peftcore.apply(deepcopy(base), "road", **options)
    (operator,) = injection.operators.values()
    moved(operator)
    tensors, swap = copies(operator), int(name in ("transposed", "embedding"))
    R = matrix(tensors["angle"], tensors["length"], variant, group_size)
    held = dict(base.named_parameters())
    weight = torch.tensordot(R, held["layer.weight"].transpose(0, swap), 1).transpose(0, swap)
    stored = {"layer.weight": weight} | ({"layer.bias": R @ held["layer.bias"]} if "layer.bias" in held else {})
    ours, expected = injection.model(x), functional_call(base, stored, (x,))
    assert difference(ours, base(x)) >= 0.01
    assert difference(ours, expected) <= EXACT
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    assert difference(operator.angle.grad, tensors["angle"].grad) <= EXACT
    assert difference(operator.length.grad, tensors["length"].grad) <= EXACT
    injection.bake()
    for key, value in stored.items():
        assert difference(injection.model.get_parameter(key), value) <= EXACT


@VARIANTS
def test_experts_turn_each_by_itself(variant: int) -> None:
    _, experts = merged_experts("road", moved, variant=variant, group_size=4)
    for old, new, tensors in experts:
        assert difference(new, old) > 0.01
        assert difference(new, matrix(tensors["angle"], tensors["length"], variant, 4) @ old) <= EXACT


def test_a_rotation_keeps_lengths() -> None:
    base = One(nn.Linear(12, 8, bias=False)).double()
    x = torch.randn(5, 12).double()
    before = base(x)
    (operator,) = peftcore.apply(base, "road", target="layer", group_size=4, dtype="float64").operators.values()
    nn.init.normal_(operator.angle)
    assert difference(base(x), before) > 0.1
    torch.testing.assert_close(base(x).norm(dim=-1), before.norm(dim=-1))


def test_refusals() -> None:
    with pytest.raises(UnsupportedSite, match="7 outputs, which group_size=2 does not divide"):
        peftcore.apply(One(nn.Linear(12, 7)), "road", target="layer")
    for options in ({"group_size": 3}, {"variant": 3}):
        with pytest.raises(ConfigError):
            peftcore.apply(One(nn.Linear(12, 6)), "road", target="layer", **options)


def two() -> Two:
    """With a bias and without."""
    return Two(nn.Linear(12, 8), nn.Linear(8, 16, bias=False))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.angle", operator.angle, layer.road_theta[ADAPTER], lambda t: t)
    yield Pair(f"{site.path}.length", operator.length, layer.road_alpha[ADAPTER], lambda t: t)


def both(base: nn.Module, target: list[str], variant: int, group_size: int) -> Both:
    config = peft.RoadConfig(target_modules=target, variant=f"road_{variant}", group_size=group_size)
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    ours = {"target": target, "variant": variant, "group_size": group_size, "dtype": dtype}
    compared = Both(base, "road", ours, config, pairs)
    for pair in compared.pairs:
        if pair.name.endswith("length"):
            compared.change(pair.name, lambda length: length.add_(1))
    return compared


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("group_size", [2, 8])
@VARIANTS
@against("peft 0.21", "road")
def test_beside_peft(variant: int, group_size: int, training: bool) -> None:
    """Outputs, gradients, merged weights and biases, and as many parameters."""
    torch.manual_seed(0)
    compared = both(two().double().train(training), ["first", "second"], variant, group_size)
    count = sum(p.numel() for p in compared.tuner.model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in compared.injection.parameters()) == variant * (8 + 16)
    x = torch.randn(2, 3, 12).double()
    compared.assert_same(lambda model: model(x))


@against("peft 0.21", "road")
def test_a_model_beside_peft() -> None:
    model, inputs = HOSTS["llama"].build()
    both(model.eval(), ["q_proj", "v_proj"], 2, 4).assert_same(lambda adapted: adapted(**inputs).logits)


def test_the_operator_converts_as_modules_do() -> None:
    """No attribute of the operator hides a method of `nn.Module`, such as `half`."""
    (operator,) = peftcore.apply(One(nn.Linear(6, 4)), "road", target="layer").operators.values()
    assert operator.half().get_parameter("angle").dtype is torch.float16


def test_an_operator_is_cast_by_half() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(4, 8)), "road", target="0", group_size=4)
    (operator,) = injection.operators.values()
    assert {each.dtype for each in operator.half().parameters()} == {torch.float16}
