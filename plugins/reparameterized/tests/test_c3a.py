"""C3A beside peft's and beside its equation, entry by entry; its start, and the rank of what it makes."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import adapted, assert_equation
from one_layer import One
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


# Hosts are narrower than the default block.
@conformance("c3a", options={"*": {"block_size": 4}, "mlp": {"block_size": 2}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def circulant(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    matrix, w = weight.flatten(1), tensors["w"]
    b = w.shape[-1]
    rows = []
    for o in range(matrix.shape[0]):
        entries = [w[o // b, k // b, (k % b - o % b) % b] for k in range(matrix.shape[1])]
        rows.append(torch.stack(entries))
    return weight + (torch.stack(rows) / matrix.shape[1]).view(weight.shape)


SIZES = {"convolution": 6, "grouped": 3, "linear": 1, "wide": 1, "experts": 1, "embedding": 1}
"""The widest block of each layer."""


@pytest.mark.parametrize("kind", SIZES)
def test_equation(kind: str) -> None:
    assert_equation(kind, "c3a", circulant, block_size=SIZES[kind])


@pytest.mark.parametrize("size", [2, 3, 4, 6, 12])
def test_both_forms(size: int) -> None:
    """Even and odd widths, of which a transform keeps other numbers of frequencies; on vectors and as a weight."""
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 12).double(), torch.randn(2, 3, 24).double()
    base = One(layer)
    before = layer.weight.detach().clone()
    injection = peftcore.apply(base, "c3a", target="layer", block_size=size, dtype="float64")
    (operator,) = injection.operators.values()
    w = nn.init.normal_(operator.w).detach().clone().requires_grad_()
    expected = nn.functional.linear(x, circulant(before, {"w": w}), layer.bias.detach())
    output = base(x)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(operator.w.grad, w.grad)
    torch.testing.assert_close(operator.merged(before), circulant(before, {"w": w}).detach())


def test_the_rank_is_that_of_the_blocks() -> None:
    """With as many parameters as a LoRA of rank 1 would have in a weight half as high."""
    layer = nn.Linear(24, 24).double()
    before = layer.weight.detach().clone()
    injection = peftcore.apply(One(layer), "c3a", target="layer", block_size=24, dtype="float64")
    assert sum(p.numel() for p in injection.parameters()) == 24
    nn.init.normal_(injection.operators["layer"].w)
    injection.merge()
    assert torch.linalg.matrix_rank(layer.weight - before) == 24


@pytest.mark.parametrize(
    ("start", "bound"), [("xavier_uniform", math.sqrt(6 / 96)), ("kaiming_uniform", math.sqrt(1 / 64)), ("zeros", 0)]
)
def test_start(start: str, bound: float) -> None:
    options = {"target": "layer", "block_size": 2, "start": start}
    (operator,) = peftcore.apply(One(nn.Linear(64, 32)), "c3a", **options).operators.values()
    assert 0.99 * bound <= operator.w.abs().max() <= bound


def test_a_gaussian_start() -> None:
    (operator,) = peftcore.apply(
        One(nn.Linear(64, 32)), "c3a", target="layer", block_size=2, start="gaussian"
    ).operators.values()
    assert operator.w.std().item() == pytest.approx(1, abs=0.1)


def test_what_does_not_cut_evenly_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match=r"6 x 24, which blocks of block_size=4 .* its largest is 6"):
        adapted("convolution", "c3a", block_size=4)


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(site.path, operator.w, layer.c3a_kernel[ADAPTER], lambda t: t)


def both(base: nn.Module, target: list[str], size: int) -> Both:
    config = peft.C3AConfig(target_modules=target, block_size=size)
    return Both(base, "c3a", {"target": target, "block_size": size}, config, pairs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
@against("peft 0.21", "c3a")
def test_beside_peft(size: int, training: bool) -> None:
    """Outputs, gradients, merged weights, and as many parameters; in float32, as peft computes in any model. One layer:
    see below."""
    torch.manual_seed(0)
    compared = both(One(nn.Linear(12, 8)).train(training), ["layer"], size)
    count = sum(p.numel() for p in compared.tuner.model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in compared.injection.parameters()) == 12 * 8 // size
    compared.change("layer", lambda kernel: kernel.mul_(10))  # of which a twelfth is added
    x = torch.randn(2, 3, 12)
    compared.assert_same(lambda model: model(x))


@against("peft 0.21", "c3a")
def test_a_model_beside_peft() -> None:
    """Outputs and merged weights, and gradients of what stands last."""
    model, inputs = HOSTS["llama"].build()
    compared = both(model.eval(), ["q_proj", "v_proj"], 4)
    for pair in compared.pairs:
        compared.change(pair.name, lambda kernel: kernel.mul_(30))
    compared.pairs = [pair for pair in compared.pairs if "layers.1.self_attn.v" in pair.name]
    compared.assert_same(lambda adapted: adapted(**inputs).logits)


@against("peft 0.21", "c3a")
def test_gradients_of_inputs() -> None:
    """Those of peft's own autograd function are wrong for blocks wider than 2, so that all in front of a layer gets
    wrong gradients: it correlates with the kernel where it is to convolve. Ours are those of finite differences."""
    torch.manual_seed(0)
    compared = both(One(nn.Linear(12, 8)), ["layer"], 4)
    compared.change("layer", lambda kernel: kernel.mul_(10))
    x, direction = torch.randn(3, 12), torch.randn(3, 8)
    gradients = []
    for model in (compared.ours, compared.tuner.model):
        leaf = x.clone().requires_grad_()
        (model(leaf) * direction).sum().backward()
        gradients.append(leaf.grad)
    precise, step = compared.ours.double(), 1e-4 * torch.eye(36).double().view(36, 3, 12)
    with torch.no_grad():
        slopes = [((precise(x + each) - precise(x - each)) * direction).sum() / 2e-4 for each in step]
    slopes = torch.stack(slopes).view(3, 12)
    assert difference(gradients[0], slopes) <= 1e-5
    assert difference(gradients[1], slopes) >= 1e-2
