"""DEFT beside peft's and beside its equation; its start, and the directions that it takes away."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation, hosted, logical
from one_layer import One
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import TrainingError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
RANK = 3


@conformance("deft", options={"*": {"rank": 3}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@conformance("deft", hosts=["llama"], options={"llama": {"rank": 3, "projection": "qr", "alpha": 6.0}})
def test_conformance_of_a_projection(check: Callable[[], None]) -> None:
    check()


def equation(projection: str, scale: float) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    def replaced(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        matrix, P = weight.flatten(1), tensors["P"]
        if projection == "qr":
            across: list[Tensor] = []
            signs = torch.linalg.qr(P.detach()).R.diagonal().sign()  # which are up to the library
            for sign, p in zip(signs, P.T, strict=True):
                for q in across:
                    p = p - (p @ q) * q
                across.append(sign * p / (p @ p).sqrt())
            Q = T = torch.stack(across, 1)
        else:
            Q, T = P, torch.where(P > 0, P, 0.0)
        removed = Q @ T.T @ matrix
        put_in = scale * Q @ tensors["R"].flatten(1) if "R" in tensors else 0
        return weight + (put_in - removed).view(weight.shape)

    return replaced


@pytest.mark.parametrize("projection", ["relu", "qr"])
@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str, projection: str) -> None:
    assert_equation(kind, "deft", equation(projection, 1.0), rank=RANK, projection=projection)


def test_scale_and_taking_away_alone() -> None:
    assert_equation("linear", "deft", equation("relu", 9.0 / RANK), rank=RANK, alpha=9.0)
    assert_equation("linear", "deft", equation("qr", 1.0), rank=RANK, projection="qr", injects=False)
    assert_equation("convolution", "deft", equation("relu", 1.0), rank=RANK, injects=False)


@pytest.mark.parametrize("projection", ["relu", "qr"])
@pytest.mark.parametrize("alpha", [None, 12.0])
def test_start(alpha: float | None, projection: str) -> None:
    """What is taken away is put back."""
    host, _, operator = adapted("convolution", "deft", rank=RANK, alpha=alpha, projection=projection)
    base, x = hosted("convolution")
    assert operator.P.std().item() == pytest.approx(0.02, rel=0.5)
    assert difference(host(x), base(x)) <= 1e-6
    weight = logical("convolution", host).flatten(1)
    scale = 1.0 if alpha is None else alpha / RANK
    assert difference(scale * operator.R.flatten(1), operator.directions()[1].T @ weight) <= 1e-6


def test_a_projection_takes_away_the_rank() -> None:
    layer = nn.Linear(12, 7).double()
    options = {"target": "layer", "rank": 3, "projection": "qr", "injects": False, "dtype": "float64"}
    injection = peftcore.apply(One(layer), "deft", **options)
    assert sum(p.numel() for p in injection.parameters()) == 3 * 7
    (operator,) = injection.operators.values()
    injection.merge()
    assert torch.linalg.matrix_rank(layer.weight) == 4
    assert (operator.P.T @ layer.weight).abs().max() <= 1e-12


def test_dropout_drops_inputs_of_what_is_put_in_alone() -> None:
    host, _, operator = adapted("linear", "deft", rank=RANK, dropout=0.5)
    x = hosted("linear")[1]
    nn.init.zeros_(operator.R)
    assert torch.equal(host.train()(x), host.eval()(x))
    nn.init.normal_(operator.R)
    assert not torch.equal(host.train()(x), host.eval()(x))
    with pytest.raises(UnsupportedSite, match="dropout"):
        adapted("experts", "deft", dropout=0.5)
    host, injection, _ = adapted("convolution", "deft", rank=RANK, dropout=0.5)
    x = hosted("convolution")[1]
    assert difference(host.train()(x), host.eval()(x)) > 0
    injection.low_memory = True
    with pytest.raises(TrainingError, match="dropout"):
        host.train()(x)


class Two(nn.Module):
    """With a bias and without; stored one way and the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 7), nn.Linear(7, 9, bias=False), Conv1D(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    for name, parameter in operator.named_parameters():
        yield Pair(f"{site.path}.{name}", parameter, getattr(layer, f"deft_{name}")[ADAPTER], lambda t: t)


THEIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "relu": ({}, {}),
    "qr": ({"decomposition_method": "qr"}, {"projection": "qr"}),
    "scaled": ({"alpha": 9}, {"alpha": 9.0}),
    "para": ({"para": True, "decomposition_method": "qr"}, {"injects": False, "projection": "qr"}),
}


def both(base: nn.Module, target: list[str], form: str, **more: Any) -> Both:
    theirs, ours = THEIRS[form]
    config = peft.DeftConfig(target_modules=target, r=RANK, **theirs, **more)
    return Both(base, "deft", {"target": target, "rank": RANK, **ours}, config, pairs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", THEIRS)
@against("peft 0.21", "deft")
def test_beside_peft(form: str, training: bool) -> None:
    """Outputs, gradients, merged weights, and as many parameters; in float32, as peft computes in any model."""
    torch.manual_seed(0)
    compared = both(Two().train(training), ["first", "second"], form)
    count = sum(p.numel() for p in compared.tuner.model.parameters() if p.requires_grad)
    expected = RANK * (7 + 9) + (0 if form == "para" else RANK * (12 + 7))
    assert count == sum(p.numel() for p in compared.injection.parameters()) == expected
    for pair in compared.pairs:
        compared.change(pair.name, lambda value: value.mul_(3))
    x = torch.randn(2, 3, 12)
    compared.assert_same(lambda model: model(x))


@against("peft 0.21", "deft")
def test_stored_the_other_way_beside_peft() -> None:
    torch.manual_seed(0)
    compared = both(Two(), ["third"], "relu", fan_in_fan_out=True)
    for pair in compared.pairs:
        compared.change(pair.name, lambda value: value.mul_(3))
    x = torch.randn(2, 3, 12)
    compared.assert_same(lambda model: model(x))


@against("peft 0.21", "deft")
def test_a_model_beside_peft() -> None:
    model, inputs = HOSTS["llama"].build()
    both(model.eval(), ["q_proj", "v_proj"], "qr").assert_same(lambda adapted: adapted(**inputs).logits)
