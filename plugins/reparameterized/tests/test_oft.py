"""OFT: the promises of the kit, peft's numbers without its Neumann series, the equation in float64 on the layers where
peft computes something else, and what a rotation keeps."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import LACKING, LAYERS, assert_weight, copies, frozen, merged_experts
from one_layer import One
from peft_pairs import ADAPTER, MOVED, OUTPUTS, Both, Pair, difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
EXACT, BLOCK = 1e-12, 4


@conformance("oft", options={"*": {"block_size": BLOCK}})  # several blocks, also in narrow hosts
def test_conformance(check: Callable[[], None]) -> None:
    check()


def both(base: nn.Module, target: list[str], series: bool = False, eps: float | None = None, **options: Any) -> Both:
    """The same adapter here and in peft, whose `eps` has no b^2 in it."""
    config = peft.OFTConfig(target_modules=target, r=0, oft_block_size=BLOCK, use_cayley_neumann=series, **options)
    config.coft, config.eps = eps is not None, (eps or 0) * BLOCK**2
    return Both(base, "oft", {"target": target, "block_size": BLOCK, "eps": eps, **options}, config, pairs)


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(site.path, operator.K, layer.oft_R[ADAPTER].weight, lambda t: t)


OPTIONS = [{}, {"block_share": True}, {"eps": 0.01}, {"eps": 0.01, "block_share": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=["blocks", "shared", "coft", "coft-shared"])
@pytest.mark.parametrize("bias", [True, False])
@against("peft 0.21", "oft")
def test_beside_peft(bias: bool, options: dict[str, Any]) -> None:
    """Outputs, gradients and merged weights; of more rows than outputs the weight turns."""
    x = torch.randn(2, 4, 12)
    both(One(nn.Linear(12, 7, bias=bias)), ["layer"], **options).assert_same(lambda model: model(x))


@against("peft 0.21", "oft")
def test_a_model_beside_peft() -> None:
    model, inputs = HOSTS["llama"].build()
    both(model.eval(), ["q_proj", "v_proj"]).assert_same(lambda adapted: adapted(**inputs).logits)


def test_where_peft_differs() -> None:
    """Its series turns the other way, and is near for small entries; its 3x3 kernels are no identity."""
    x = torch.randn(5, 12)
    pair = both(One(nn.Linear(12, 7)), ["layer"], series=True)
    pair.change("layer", lambda K: K.mul_(0.1))
    pair.pairs[0].theirs.data.neg_()
    pair.assert_same_outputs(lambda model: model(x))
    pair = both(One(nn.Conv2d(4, 6, 3)), ["layer"])
    pair.change("layer", torch.Tensor.zero_)
    base, ours, theirs = pair.outputs(lambda model: model(torch.ones(1, 4, 5, 5)))
    assert difference(ours, base) <= OUTPUTS < MOVED < difference(theirs, base)


def adapted(layer: nn.Module, **options: Any) -> tuple[nn.Module, peftcore.Injection, Any]:
    """A double host, its injection with random entries, and the operator."""
    model = One(layer).double()
    options = {"target": "layer", "dtype": "float64", "block_size": BLOCK} | options
    injection = peftcore.apply(model, "oft", **options)
    (operator,) = injection.operators.values()
    nn.init.normal_(operator.K, std=0.1)
    return model, injection, operator


def rotation(entries: Tensor, size: int, width: int) -> Tensor:
    """The whole R [width, width]: one matrix a block, entry by entry."""
    one, blocks = torch.eye(size, dtype=torch.float64), []
    for block in entries.expand(width // size, -1):
        upper = [(i, j) for i in range(size) for j in range(i + 1, size)]
        turns = [torch.outer(one[i], one[j]) - torch.outer(one[j], one[i]) for i, j in upper]
        K = sum(value * turn for value, turn in zip(block, turns, strict=True))
        blocks.append((one - K) @ torch.linalg.inv(one + K))
    return torch.block_diag(*blocks)


def by_rows(weight: Tensor, R: Tensor) -> Tensor:
    """Each filter is one row, whatever the shape of its kernel."""
    return torch.stack([R @ row.flatten() for row in weight]).view(weight.shape)


@pytest.mark.parametrize("share", [False, True], ids=["blocks", "shared"])
@pytest.mark.parametrize("name", ["transformers-conv1d", "linear", *LACKING])
def test_equation(name: str, share: bool) -> None:
    base, x = frozen(*LAYERS[name])
    _, injection, operator = adapted(deepcopy(base.layer), block_share=share)
    tensors, swap = copies(operator), int(name.startswith("trans"))
    rows = base.layer.weight.transpose(0, swap)
    weight = by_rows(rows, rotation(tensors["K"], BLOCK, rows[0].numel())).transpose(0, swap)
    assert_weight(base, x, injection, weight, tensors, exact=EXACT, moved=0.01)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_turn(name: str) -> None:
    base, x = frozen(*LAYERS[name])
    _, injection, operator = adapted(deepcopy(base.layer), side="outputs")
    tensors, axis = copies(operator), int(name in ("transformers-conv1d", "transposed", "embedding"))
    width = base.layer.weight.shape[axis]
    weight = torch.tensordot(rotation(tensors["K"], operator.size, width), base.layer.weight, ([1], [axis]))
    assert_weight(base, x, injection, weight.movedim(0, axis), tensors, exact=EXACT, moved=0.01)


def test_the_series_sums_powers() -> None:
    _, _, operator = adapted(nn.Linear(12, 7), series=6)
    _, _, exact = adapted(nn.Linear(12, 7))
    exact.K.data.copy_(operator.K)
    for R, solved, entries in zip(operator.rotation(), exact.rotation(), operator.K, strict=True):
        upper = torch.zeros(BLOCK, BLOCK).double()
        upper[*torch.triu_indices(BLOCK, BLOCK, 1)] = entries.detach()
        K = upper - upper.T
        powers = [torch.linalg.matrix_power(-K, n) for n in range(6)]
        assert difference(R, powers[0] + 2 * sum(powers[1:5]) + powers[5]) <= EXACT
        assert EXACT < difference(R, solved) < 0.1


def test_experts_turn_each_by_itself() -> None:
    _, experts = merged_experts("oft", lambda operator: nn.init.normal_(operator.K, std=0.1), block_size=BLOCK)
    for old, new, tensors in experts:
        assert difference(new, old) > 0.01
        assert difference(new, by_rows(old, rotation(tensors["K"], BLOCK, old.shape[-1]))) <= EXACT


@pytest.mark.parametrize("size", [0.1, 3.0, 1e3])
def test_lengths_and_angles_stay_however_large_the_entries(size: float) -> None:
    layer = nn.Linear(12, 7).double()
    before = layer.weight.detach().clone()
    _, injection, operator = adapted(layer)
    nn.init.normal_(operator.K, std=size)
    injection.merge()
    assert difference(layer.weight, before) > 0.1
    assert difference(layer.weight @ layer.weight.T, before @ before.T) <= 1e-10
    assert torch.linalg.det(operator.rotation()).min() > 0.99


@pytest.mark.parametrize(("width", "wanted", "size"), [(12, 5, 4), (10, 4, 5), (36, 32, 36), (147, 32, 21)])
def test_blocks_have_the_nearest_width_that_fits(width: int, wanted: int, size: int) -> None:
    operator = adapted(nn.Linear(width, 3), block_size=wanted)[2]
    assert operator.rotation().shape == (width // size, size, size)


@pytest.mark.parametrize("act", [peftcore.plan, peftcore.apply])
def test_a_prime_width_far_from_the_wanted_one_is_refused(act: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedSite, match="layer rotates 127 coordinates, which no block width from 2 to 64"):
        act(One(nn.Linear(127, 3)), "oft", target="layer")
