"""HRA: the promises of the kit, peft's numbers, the equation in float64 reflection by reflection on the layers that
peft lacks, its start, its loss, and the orthonormal form."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import LACKING, LAYERS, assert_weight, copies, frozen, merged_experts
from one_layer import One
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
EXACT, RANK = 1e-12, 4


# No weight has six rows; and of "moe" no two experts are nearly tied in bfloat16.
@conformance("hra", options={"*": {"rank": 6}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(site.path, operator.U, layer.hra_u[ADAPTER], lambda t: t.T)


def both(base: nn.Module, target: list[str], gram_schmidt: bool) -> Both:
    config = peft.HRAConfig(target_modules=target, r=RANK, apply_GS=gram_schmidt)
    return Both(base, "hra", {"target": target, "rank": RANK, "gram_schmidt": gram_schmidt}, config, pairs)


FORMS = pytest.mark.parametrize("gram_schmidt", [False, True], ids=["sequence", "gram-schmidt"])
BESIDE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 7), (2, 3, 12)),
    "linear-no-bias": (lambda: nn.Linear(12, 7, bias=False), (5, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
}


@FORMS
@pytest.mark.parametrize("name", BESIDE)
@against("peft 0.21", "hra")
def test_beside_peft(name: str, gram_schmidt: bool) -> None:
    """Outputs, gradients and merged weights."""
    build, shape = BESIDE[name]
    x = torch.randn(shape)
    both(One(build()), ["layer"], gram_schmidt).assert_same(lambda model: model(x))


@FORMS
@against("peft 0.21", "hra")
def test_a_model_beside_peft(gram_schmidt: bool) -> None:
    model, inputs = HOSTS["llama"].build()
    both(model.eval(), ["q_proj", "v_proj"], gram_schmidt).assert_same(lambda adapted: adapted(**inputs).logits)


def adapted(layer: nn.Module, **options: Any) -> tuple[nn.Module, peftcore.Injection, Any]:
    """A double host, its injection with vectors moved by noise, and the operator."""
    model = One(layer).double()
    injection = peftcore.apply(model, "hra", target="layer", dtype="float64", **{"rank": RANK} | options)
    (operator,) = injection.operators.values()
    with torch.no_grad():
        operator.U.add_(torch.randn_like(operator.U) * 0.1)
    return model, injection, operator


def by_rows(weight: Tensor, U: Tensor, gram_schmidt: bool = False) -> Tensor:
    """Each filter is one row, whatever the shape of its kernel, and goes through one reflection after the other."""
    across: list[Tensor] = []
    for u in U:
        for q in across if gram_schmidt else []:
            u = u - (u @ q) * q
        across.append(u / (u @ u).sqrt())
    rows = weight.flatten(1)
    for u in across:
        rows = torch.stack([row - 2 * (row @ u) * u for row in rows])
    return rows.view(weight.shape)


@FORMS
@pytest.mark.parametrize("name", LACKING)
def test_equation(name: str, gram_schmidt: bool) -> None:
    base, x = frozen(*LAYERS[name])
    _, injection, operator = adapted(deepcopy(base.layer), gram_schmidt=gram_schmidt)
    tensors, swap = copies(operator), int(name == "transposed")
    weight = by_rows(base.layer.weight.transpose(0, swap), tensors["U"], gram_schmidt).transpose(0, swap)
    assert_weight(base, x, injection, weight, tensors, exact=EXACT, moved=0.01)


def test_experts_reflect_each_by_itself() -> None:
    _, experts = merged_experts("hra", lambda operator: nn.init.normal_(operator.U, std=0.1), rank=RANK)
    for old, new, tensors in experts:
        assert difference(new, old) > 0.01
        assert difference(new, by_rows(old, tensors["U"])) <= EXACT


def test_starts_in_pairs_that_cancel() -> None:
    layer = nn.Linear(400, 30).double()
    before, rank = layer.weight.detach().clone(), 8
    injection = peftcore.apply(One(layer), "hra", target="layer", rank=rank, dtype="float64")
    U, bound = injection.operators["layer"].U, 1 / math.sqrt(rank / 2)
    assert torch.equal(U[0::2], U[1::2])
    assert torch.linalg.svdvals(U[0::2]).min() > 1  # the pairs differ
    assert 0.98 * bound < U.abs().max() <= bound
    injection.merge()
    assert difference(layer.weight, before) <= EXACT


def test_vectors_of_zeros_reflect_nothing_and_train_without_nan() -> None:
    model, _, operator = adapted(nn.Linear(12, 7))
    operator.U.data[1] = 0
    x = torch.randn(5, 12).double()
    output = model(x)
    weight = by_rows(model.layer.weight, operator.U[[0, 2, 3]])
    assert difference(output, nn.functional.linear(x, weight, model.layer.bias)) <= EXACT
    output.sum().backward()
    assert torch.isfinite(operator.U.grad).all()


def test_orthonormal_directions_start_unpaired() -> None:
    """From pairs the second of each would be what rounding leaves, normalized."""
    options = {"target": "layer", "rank": 8, "gram_schmidt": True}
    (operator,) = peftcore.apply(One(nn.Linear(400, 30)), "hra", **options).operators.values()
    assert torch.linalg.svdvals(operator.directions()).min() > 0.5
    for act in (peftcore.plan, peftcore.apply):
        with pytest.raises(UnsupportedSite, match="6 inputs, too few for 8 orthogonal directions"):
            act(One(nn.Linear(6, 9)), "hra", **options)


def test_orthogonality_is_the_sum_of_the_distances_of_all_sites() -> None:
    model = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 9)).double()
    injection = peftcore.apply(model, "hra", target=["0", "2"], rank=RANK, orthogonality=0.3, dtype="float64")
    expected = 0.0
    for operator in injection.operators.values():
        N = torch.stack([u / u.norm() for u in nn.init.normal_(operator.U)])
        expected += 0.3 * (torch.eye(RANK) - N @ N.T).square().sum().sqrt()
    own = injection.method.aux_loss(injection)
    torch.testing.assert_close(own, expected)
    own.backward()
    assert all(operator.U.grad.any() for operator in injection.operators.values())


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_rank_is_even(rank: int) -> None:
    with pytest.raises(ConfigError):
        peftcore.apply(One(nn.Linear(12, 7)), "hra", target="layer", rank=rank)
