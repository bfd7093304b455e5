"""BOFT: the promises of the kit, the numbers of the authors' code (which is peft's) and of LyCORIS, the equation in
float64 with permutations written out, and what the factors reach."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import assert_weight, copies, frozen, merged_experts
from lycoris.functional.boft import diff_weight
from one_layer import One
from peft.tuners.boft import layer as peft_boft
from peft_pairs import ADAPTER, FILL, MERGED, MOVED, Both, Pair, difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
EXACT, BLOCK = 1e-12, 4
ABOVE = torch.triu_indices(BLOCK, BLOCK, 1)


ONE = {
    "factors": 1
}  # widths that cannot be halved: 27 in the convolutions, 14 in the UNet, 6 in the perceptron's checks
OPTIONS = {
    "*": {"block_size": BLOCK},
    "convnet": ONE,
    "mlp": ONE,
    "unet": ONE,
    "moe": {"block_size": 8},  # where no two of its experts are nearly tied in bfloat16
}


@conformance("boft", options=OPTIONS)
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Kernel:
    """What peft's CUDA kernel computes: [factors, blocks, b, b] to [factors, blocks * b, blocks * b], and back."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*each) for each in blocks])]

    def backward(self, gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        size = blocks.shape[-1]
        cut = [[each[i : i + size, i : i + size] for i in range(0, each.shape[0], size)] for each in gradient]
        return [torch.stack([torch.stack(each) for each in cut])]


class BothOfBOFT(Both):
    """With peft's Q made from our entries: half of what stands above its diagonal, when nothing stands below."""

    def _fill(self) -> None:
        for pair in self.pairs:
            nn.init.normal_(pair.ours, float(pair.name.endswith("gain")), FILL)
            if pair.name.endswith("gain"):
                pair.theirs.data.copy_(pair.ours.view(pair.theirs.shape))
            else:
                pair.theirs.data[..., ABOVE[0], ABOVE[1]] = 2 * pair.ours.detach()


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.K", operator.K, layer.boft_R[ADAPTER], lambda t: t[..., ABOVE[0], ABOVE[1]], 2.0)
    yield Pair(f"{site.path}.gain", operator.gain, layer.boft_s[ADAPTER], lambda t: t.view(-1))


def both(base: nn.Module, target: list[str], factors: int) -> Both:
    config = peft.BOFTConfig(target_modules=target, boft_block_size=BLOCK, boft_n_butterfly_factor=factors)
    return BothOfBOFT(base, "boft", {"target": target, "block_size": BLOCK, "factors": factors}, config, pairs)


BESIDE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(32, 7), (2, 4, 32)),
    "linear-no-bias": (lambda: nn.Linear(32, 7, bias=False), (5, 32)),
    "conv2d": (lambda: nn.Conv2d(16, 6, 3, stride=2, padding=1), (2, 16, 7, 7)),
}


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("name", BESIDE)
@against("peft 0.21", "boft")
def test_beside_peft(name: str, factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients and merged weights."""
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: Kernel())
    build, shape = BESIDE[name]
    x = torch.randn(shape)
    both(One(build()), ["layer"], factors).assert_same(lambda model: model(x))


@against("peft 0.21", "boft")
def test_a_model_beside_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: Kernel())
    model, inputs = HOSTS["llama"].build()
    both(model.eval(), ["q_proj", "v_proj"], 2).assert_same(lambda adapted: adapted(**inputs).logits)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_beside_lycoris(factors: int) -> None:
    """It turns the outputs, so it is given the transposed weight."""
    layer = nn.Linear(32, 7, bias=False)
    before = layer.weight.detach().clone()
    injection = peftcore.apply(One(layer), "boft", target="layer", block_size=BLOCK, factors=factors)
    K = nn.init.normal_(injection.operators["layer"].K, std=FILL).detach()
    upper = torch.zeros(*K.shape[:-1], BLOCK, BLOCK)
    upper[..., ABOVE[0], ABOVE[1]] = K
    order = [0, 2, 1, 3]  # its blocks take turns between the halves
    expected = before + diff_weight(before.T, -upper[..., order, :][..., order], None, backend="torch").T
    injection.merge()
    assert difference(layer.weight, before) >= MOVED
    assert difference(layer.weight, expected) <= MERGED


def adapted(layer: nn.Module, **options: Any) -> tuple[nn.Module, peftcore.Injection, Any]:
    """A double host, its injection with all tensors moved by noise, and the operator."""
    model = One(layer).double()
    options = {"target": "layer", "dtype": "float64", "block_size": BLOCK, "factors": 2} | options
    injection = peftcore.apply(model, "boft", **options)
    (operator,) = injection.operators.values()
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, injection, operator


def rotation(K: Tensor, size: int, width: int) -> Tensor:
    """The whole R [width, width]: a dense matrix for each factor, the first one rightmost."""
    whole, one, above = torch.eye(width).double(), torch.eye(size).double(), torch.triu_indices(size, size, 1)
    for factor, blocks in enumerate(K):
        B, half, distance = torch.zeros(width, width).double(), size // 2, 2**factor
        for block, entries in enumerate(blocks):
            upper = torch.zeros(size, size).double().index_put((above[0], above[1]), entries)
            first = block // distance * 2 * distance + block % distance  # two runs of half a block, so far apart
            place = torch.tensor([run * half + i for run in (first, first + distance) for i in range(half)])
            R = (one - upper + upper.T) @ torch.linalg.inv(one + upper - upper.T)
            B = B.index_put((place[:, None], place[None, :]), R)
        whole = B @ whole
    return whole


def by_rows(weight: Tensor, R: Tensor, gain: Tensor) -> Tensor:
    """Each filter is one row, whatever the shape of its kernel, with a gain of its own."""
    return torch.stack([s * (R @ row.flatten()) for s, row in zip(gain, weight, strict=True)]).view(weight.shape)


WIDER: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # their widths can be halved
    "conv1d": (lambda: nn.Conv1d(8, 6, 2, stride=2, padding=1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (3, 2), dilation=2), (2, 8, 7, 6)),
    "grouped": (lambda: nn.Conv2d(32, 6, (3, 1), groups=2), (2, 32, 5, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 6, 3, stride=2), (2, 16, 3, 3)),
    "embedding": (lambda: nn.Embedding(9, 16), (2, 5)),
}


@pytest.mark.parametrize("factors", [1, 3])
@pytest.mark.parametrize("name", WIDER)
def test_equation(name: str, factors: int) -> None:
    base, x = frozen(*WIDER[name])
    _, injection, operator = adapted(deepcopy(base.layer), factors=factors)
    tensors, swap = copies(operator), int(name == "transposed")
    rows, gain = base.layer.weight.transpose(0, swap), tensors["gain"]
    R = rotation(tensors["K"], BLOCK, rows[0].numel())
    weight = torch.stack([gain * (R @ row) for row in rows]) if name == "embedding" else by_rows(rows, R, gain)
    assert_weight(base, x, injection, weight.transpose(0, swap), tensors, exact=EXACT, moved=0.01)


OUTPUTS_OF: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 16), (2, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(8, 16, (3, 2), dilation=2, groups=2), (2, 8, 7, 6)),
}


@pytest.mark.parametrize("factors", [1, 3])
@pytest.mark.parametrize("name", OUTPUTS_OF)
def test_outputs_turn(name: str, factors: int) -> None:
    base, x = frozen(*OUTPUTS_OF[name])
    _, injection, operator = adapted(deepcopy(base.layer), factors=factors, side="outputs")
    tensors = copies(operator)
    weight = tensors["gain"][:, None] * rotation(tensors["K"], BLOCK, 16) @ base.layer.weight.flatten(1)
    assert_weight(base, x, injection, weight.view(base.layer.weight.shape), tensors, exact=EXACT, moved=0.01)


def test_experts_turn_each_by_itself() -> None:
    def fill(operator: Any) -> None:
        nn.init.normal_(operator.K, std=0.1)
        nn.init.normal_(operator.gain, mean=1.0, std=0.1)

    _, experts = merged_experts("boft", fill, block_size=BLOCK)
    for old, new, tensors in experts:
        R = rotation(tensors["K"], BLOCK, old.shape[-1])
        assert difference(new, by_rows(old, R, tensors["gain"])) <= EXACT


@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_each_factor_doubles_what_an_input_meets(factors: int) -> None:
    """The reason for butterflies: a dense rotation of b 2^(m - 1) coordinates from blocks of b."""
    layer = nn.Linear(32, 32, bias=False)
    layer.weight.data.copy_(torch.eye(32))
    _, injection, operator = adapted(layer, factors=factors)
    nn.init.ones_(operator.gain)
    injection.merge()
    assert (layer.weight.abs() > 1e-12).sum(0).tolist() == [BLOCK * 2 ** (factors - 1)] * 32
    assert difference(layer.weight @ layer.weight.T, torch.eye(32)) <= EXACT


@pytest.mark.parametrize(
    ("width", "wanted", "factors", "size"), [(16, 8, 2, 8), (24, 8, 2, 6), (16, 8, 3, 4), (27, 4, 1, 3)]
)
def test_blocks_have_the_nearest_width_that_fits(width: int, wanted: int, factors: int, size: int) -> None:
    operator = adapted(nn.Linear(width, 3), block_size=wanted, factors=factors)[2]
    assert operator.K.shape == (factors, width // size, size * (size - 1) // 2)


@pytest.mark.parametrize("act", [peftcore.plan, peftcore.apply])
@pytest.mark.parametrize(("width", "factors"), [(27, 2), (16, 5), (127, 1)])
def test_what_cannot_be_halved_so_often_is_refused(act: Callable[..., Any], width: int, factors: int) -> None:
    with pytest.raises(UnsupportedSite, match=f"layer rotates {width} coordinates"):
        act(One(nn.Linear(width, 3)), "boft", target="layer", factors=factors)
