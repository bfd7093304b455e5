"""LoKr: the promises of the kit, the numbers of LyCORIS and of peft in each of its forms, torch's Kronecker product in
float64 on the layers that both lack, its cuts and its start."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import assert_weight, copies, frozen, merged_experts
from lycoris.functional import factorization
from lycoris.modules.lokr import LokrModule
from one_layer import One
from peft_pairs import ADAPTER, MOVED, Both, Pair, difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.testing import against, conformance
from peftcore_reparameterized.lokr import _cut

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
EXACT, ALPHA = 1e-12, 6.0


OPTIONS = {
    "*": {"rank": 1},  # the factors of narrow weights are full beyond that
    "moe": {"alpha": 4.0},  # where no two of its experts are nearly tied in bfloat16
}


@conformance("lokr", options=OPTIONS)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@conformance("lokr", hosts=["convnet"], options={"convnet": {"rank": 1, "tucker": True, "decompose_both": True}})
def test_conformance_of_factored_kernels(check: Callable[[], None]) -> None:
    check()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 30), (2, 3, 24)),
    "conv1d": (lambda: nn.Conv1d(24, 20, 3, stride=2, padding=1, bias=False), (2, 24, 9)),
    "conv2d": (lambda: nn.Conv2d(24, 20, (3, 2), dilation=2), (2, 24, 7, 6)),
    "grouped": (lambda: nn.Conv2d(48, 20, (3, 1), groups=2), (2, 48, 5, 4)),
    "pointwise": (lambda: nn.Conv2d(24, 30, 1), (2, 24, 3, 3)),
}
FORMS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({"rank": 2}, {"w1", "w2a", "w2b"}),
    "tucker": ({"rank": 2, "tucker": True}, {"w1", "w2a", "w2b", "t2"}),
    "both": ({"rank": 1, "decompose_both": True}, {"w1a", "w1b", "w2a", "w2b"}),
    "cut": ({"rank": 2, "factor": 4}, {"w1", "w2a", "w2b"}),
    "full": ({"rank": 11}, {"w1", "w2"}),
}


def theirs_of(name: str) -> str:
    return f"lokr_{name}" if len(name) == 2 else f"lokr_{name[:2]}_{name[2]}"


@pytest.mark.parametrize("form", [*FORMS, "full_matrix"])
@pytest.mark.parametrize("name", LAYERS)
@against("lycoris 4.1", "lokr")
def test_beside_lycoris(name: str, form: str) -> None:
    """Outputs and gradients; what it merges has the scale in it twice."""
    (build, shape), options = LAYERS[name], {"rank": 1, "full_matrix": True}
    if form in FORMS:
        options, _ = FORMS[form]
    base, x = build().double(), torch.randn(shape).double()
    model = One(deepcopy(base))
    injection = peftcore.apply(model, "lokr", target="layer", alpha=ALPHA, dtype="float64", **options)
    also = {key: options[key] for key in ("decompose_both", "factor", "full_matrix") if key in options}
    tucker, rank = options.get("tucker", False), options["rank"]
    theirs = LokrModule("", base, lora_dim=rank, alpha=ALPHA, use_tucker=tucker, **also).double()
    operator = injection.operators["layer"]
    pairs = [(ours, getattr(theirs, theirs_of(each))) for each, ours in operator.named_parameters()]
    for ours, held in pairs:
        held.data.copy_(nn.init.normal_(ours, std=0.1).view(held.shape))
    assert len(pairs) == len(list(theirs.parameters()))
    output, expected = model(x), theirs(x)
    assert difference(output, base(x)) > 1000 * EXACT
    assert difference(output, expected) <= EXACT
    direction = torch.randn_like(output)
    for each in (output, expected):
        (each * direction).sum().backward()
    for ours, held in pairs:
        assert difference(ours.grad, held.grad.view(ours.shape)) <= EXACT
    assert operator.scale == (1 if form.startswith("full") else ALPHA / rank)
    delta = theirs.get_diff_weight(shape=base.weight.shape)[0] / operator.scale
    injection.bake()
    assert difference(model.layer.weight, base.weight + delta) <= EXACT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
@against("peft 0.21", "lokr")
def test_beside_peft(name: str, form: str) -> None:
    """Outputs, gradients and merged weights; with both factors full its scale is one for alpha = rank only."""
    (build, shape), (options, names) = LAYERS[name], FORMS[form]
    x, alpha = torch.randn(shape), options["rank"] if form == "full" else ALPHA
    config = peft.LoKrConfig(
        target_modules=["layer"],
        r=options["rank"],
        alpha=alpha,
        use_effective_conv2d=options.get("tucker", False),
        decompose_both=options.get("decompose_both", False),
        decompose_factor=options.get("factor", -1),
    )

    def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
        layer: Any = theirs.get_submodule(site.module_path)
        for each, ours in operator.named_parameters():
            held = getattr(layer, theirs_of(each))[ADAPTER]
            yield Pair(each, ours, held, lambda t, shape=ours.shape: t.view(shape))

    both = Both(One(build()), "lokr", {"target": "layer", "alpha": float(alpha), **options}, config, pairs)
    assert {pair.name for pair in both.pairs} == names - ({"t2"} if name in ("linear", "pointwise") else set())
    for pair in both.pairs:  # products of small numbers would hardly move the output
        both.change(pair.name, lambda t: t.mul_(5))
    if (name, form) == ("conv1d", "full"):  # there peft lays the product out wrongly
        base, ours, theirs = both.outputs(lambda model: model(x))
        assert min(difference(ours, base), difference(theirs, ours)) > MOVED
    else:
        both.assert_same(lambda model: model(x))


def update(tensors: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """The update at rank 2 by torch's own Kronecker product."""
    return ALPHA / 2 * torch.kron(tensors["w1"], tensors["w2a"] @ tensors["w2b"]).view(shape)


STORED_ACROSS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformers-conv1d": (lambda: Conv1D(30, 24), (5, 24)),
    "transposed": (lambda: nn.ConvTranspose2d(24, 30, 3, stride=2), (2, 24, 3, 3)),
    "embedding": (lambda: nn.Embedding(35, 30), (2, 5)),
}


@pytest.mark.parametrize("name", STORED_ACROSS)
def test_equation(name: str) -> None:
    """Where the other two have nothing; these weights are stored [in, out]."""
    base, x = frozen(*STORED_ACROSS[name])
    injection = peftcore.apply(deepcopy(base), "lokr", target="layer", rank=2, alpha=ALPHA, dtype="float64")
    operator = injection.operators["layer"]
    normal(operator, std=0.1)
    tensors = copies(operator)
    weight = base.layer.weight + update(tensors, base.layer.weight.transpose(0, 1).shape).transpose(0, 1)
    assert_weight(base, x, injection, weight, tensors, exact=EXACT, moved=1000 * EXACT)


def normal(operator: nn.Module, std: float = 1.0) -> None:
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=std)


def test_experts_have_updates_of_their_own() -> None:
    _, experts = merged_experts("lokr", normal, rank=2, factor=2, alpha=ALPHA)
    for old, new, tensors in experts:
        assert difference(new, old) > 0.1
        assert difference(new, old + update(tensors, old.shape)) <= EXACT


def test_cuts_are_those_of_lycoris() -> None:
    for factor in (None, 1, 2, 4, 7, 8, 16, 100):
        for size in [*range(1, 200), 768, 1000, 4096]:
            assert _cut(size, factor) == factorization(size, -1 if factor is None else factor)


@pytest.mark.parametrize("form", FORMS)
def test_starts_as_lycoris_does(form: str) -> None:
    """Same sizes, and the same tensor zero."""
    layer, (options, _) = nn.Conv2d(400, 420, 3), FORMS[form]
    operator = peftcore.apply(One(layer), "lokr", target="layer", **options).operators["layer"]
    given = {key: options[key] for key in ("decompose_both", "factor") if key in options}
    theirs = LokrModule("", layer, lora_dim=options["rank"], use_tucker=options.get("tucker", False), **given)
    for each, ours in operator.named_parameters():
        expected = getattr(theirs, theirs_of(each)).abs().max().item()
        assert ours.abs().max().item() == pytest.approx(expected, rel=0.3)
        assert (expected == 0) == (each in ("w2", "w2b"))


def test_the_layout_of_peft_has_the_same_values_in_another_order() -> None:
    """delta[j, i, q, p, kernel] in one dimension with w2 full; without effect on other layers."""
    found = {}
    for layout in ("kronecker", "peft"):
        model = One(nn.Conv1d(12, 8, 3))
        nn.init.zeros_(model.layer.weight)
        injection = peftcore.apply(model, "lokr", target="layer", rank=4, layout=layout, seed=3)
        (operator,) = injection.operators.values()
        torch.manual_seed(0)
        nn.init.normal_(operator.w2)
        found[layout] = operator.merged(model.layer.weight)
        w1, w2 = operator.w1, operator.w2.unflatten(1, (-1, 3))
    expected = torch.einsum("ip,jqk->jiqpk", w1, w2).reshape(8, 12, 3)
    torch.testing.assert_close(found["peft"], expected)
    torch.testing.assert_close(found["kronecker"], torch.einsum("ip,jqk->ijpqk", w1, w2).reshape(8, 12, 3))
    assert not torch.allclose(found["peft"], found["kronecker"])
    for layer in (nn.Linear(12, 8), nn.Conv2d(12, 8, 3)):
        model = One(layer)
        (operator,) = peftcore.apply(model, "lokr", target="layer", rank=4, layout="peft").operators.values()
        assert not operator.mixes_kernel
