"""LoHa: the promises of the kit, the numbers of LyCORIS and of peft, the equation in float64 on the layers that both
lack, and its start."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import LAYERS, assert_weight, copies, frozen, merged_experts
from lycoris.modules.loha import LohaModule
from one_layer import One
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn

import peftcore
from peftcore.testing import against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
EXACT, RANK, ALPHA = 1e-12, 3, 6.0


@conformance("loha", options={"*": {"alpha": 12.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@conformance("loha", hosts=["convnet"], options={"convnet": {"tucker": True}})
def test_conformance_of_factored_kernels(check: Callable[[], None]) -> None:
    check()


WIDE = {"wide": (lambda: nn.Linear(40, 48), (2, 3, 40))}  # so that all ranks are few: it acts beside the weight
BESIDE = {
    name: LAYERS[name] for name in ("linear", "linear-no-bias", "conv1d", "conv2d", "grouped", "pointwise")
} | WIDE
TUCKER = pytest.mark.parametrize("tucker", [False, True], ids=["flat", "tucker"])


def theirs_of(name: str) -> tuple[str, bool]:
    """The name in both libraries, and whether that tensor lies the other way round when kernels are factored."""
    letter, number = name
    return {"A": f"hada_w{number}_b", "B": f"hada_w{number}_a", "T": f"hada_t{number}"}[letter], letter == "B"


@TUCKER
@pytest.mark.parametrize("name", BESIDE)
@against("lycoris 4.1", "loha")
def test_beside_lycoris(name: str, tucker: bool) -> None:
    """Outputs and gradients; what it merges has the scale in it twice."""
    build, shape = BESIDE[name]
    base, x = build().double(), torch.randn(shape).double()
    model = One(deepcopy(base))
    options = {"target": "layer", "rank": RANK, "alpha": ALPHA, "tucker": tucker, "dtype": "float64"}
    injection = peftcore.apply(model, "loha", **options)
    theirs = LohaModule("", base, lora_dim=RANK, alpha=ALPHA, use_tucker=tucker).double()
    pairs = []
    for each, ours in injection.operators["layer"].named_parameters():
        other, turned = theirs_of(each)
        held = getattr(theirs, other)
        seen = held.T if turned and theirs.tucker else held
        seen.data.copy_(nn.init.normal_(ours, std=0.1))
        pairs.append((ours, held, turned and theirs.tucker))
    assert len(pairs) == len(list(theirs.parameters()))
    output, expected = model(x), theirs(x)
    assert difference(output, base(x)) > 1000 * EXACT
    assert difference(output, expected) <= EXACT
    direction = torch.randn_like(output)
    for each in (output, expected):
        (each * direction).sum().backward()
    for ours, held, turned in pairs:
        assert difference(ours.grad, held.grad.T if turned else held.grad) <= EXACT
    delta = theirs.get_diff_weight(shape=base.weight.shape)[0] / (ALPHA / RANK)
    injection.bake()
    assert difference(model.layer.weight, base.weight + delta) <= EXACT


@TUCKER
@pytest.mark.parametrize("name", BESIDE)
@against("peft 0.21", "loha")
def test_beside_peft(name: str, tucker: bool) -> None:
    """Outputs, gradients and merged weights. Where kernels are factored, peft's gradient of B is that of the other
    matrix's factors; LyCORIS's is right, see above."""
    build, shape = BESIDE[name]
    x = torch.randn(shape)

    def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
        layer: Any = theirs.get_submodule(site.module_path)
        for each, ours in operator.named_parameters():
            other, turned = theirs_of(each)
            turned = turned and "T1" in operator._parameters
            seen = (lambda t: t.T) if turned else (lambda t, shape=ours.shape: t.view(shape))
            yield Pair(f"{site.path}.{each}", ours, getattr(layer, other)[ADAPTER], seen)

    config = peft.LoHaConfig(target_modules=["layer"], r=RANK, alpha=ALPHA, use_effective_conv2d=tucker)
    options = {"target": "layer", "rank": RANK, "alpha": ALPHA, "tucker": tucker}
    both = Both(One(build()), "loha", options, config, pairs)
    for pair in both.pairs:  # products of four small numbers would hardly move the output
        both.change(pair.name, lambda t: t.mul_(5))
    ours, theirs = both.assert_same_outputs(lambda model: model(x))
    if "T1" in both.injection.operators["layer"]._parameters:
        with pytest.raises(AssertionError, match=r"gradient of layer.B1: relative error"):
            both.assert_same_gradients(ours, theirs)
    else:
        both.assert_same_gradients(ours, theirs)
    both.assert_same_merged()


def update(tensors: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """The update by its definition, entry by entry of the ranks."""
    halves = []
    for number in "12":
        A, B = tensors[f"A{number}"], tensors[f"B{number}"]
        halves.append(sum(torch.outer(B[:, r], A[r]) for r in range(RANK)))
    return ALPHA / RANK * (halves[0] * halves[1]).view(shape)


@pytest.mark.parametrize("name", ["transformers-conv1d", "transposed", "embedding"])
def test_equation(name: str) -> None:
    """Where the other two have nothing; these weights are stored [in, out]."""
    base, x = frozen(*LAYERS[name])
    injection = peftcore.apply(deepcopy(base), "loha", target="layer", rank=RANK, alpha=ALPHA, dtype="float64")
    operator = injection.operators["layer"]
    normal(operator, std=0.1)
    tensors = copies(operator)
    weight = base.layer.weight + update(tensors, base.layer.weight.transpose(0, 1).shape).transpose(0, 1)
    assert_weight(base, x, injection, weight, tensors, exact=EXACT, moved=1000 * EXACT)


def normal(operator: nn.Module, std: float = 1.0) -> None:
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=std)


def test_experts_have_updates_of_their_own() -> None:
    _, experts = merged_experts("loha", normal, rank=RANK, alpha=ALPHA)
    for old, new, tensors in experts:
        assert difference(new, old) > 0.1
        assert difference(new, old + update(tensors, old.shape)) <= EXACT


def test_rank_is_the_square_and_the_start_that_of_lycoris() -> None:
    layer = nn.Linear(200, 100, bias=False)
    before = layer.weight.detach().clone()
    injection = peftcore.apply(One(layer), "loha", target="layer", rank=4)
    operator = injection.operators["layer"]
    theirs = LohaModule("", nn.Linear(200, 100), lora_dim=4)
    for name, ours in operator.named_parameters():
        expected = getattr(theirs, theirs_of(name)[0]).std().item()
        assert ours.std().item() == pytest.approx(expected, rel=0.15)
    nn.init.normal_(operator.B2)
    injection.merge()
    assert torch.linalg.matrix_rank(layer.weight - before, rtol=1e-3) == 16
