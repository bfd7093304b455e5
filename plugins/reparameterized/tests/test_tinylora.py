"""TinyLoRA beside peft's and beside its equation; which sites share a vector, and what files hold."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, experts, hosted, logical
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import against, conformance

OPTIONS: dict[str, Any] = {"rank": 3, "u": 4}


# Of 64 numbers, noise makes an update as large as these weights.
@conformance("tinylora", options={"*": {"u": 8}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def between(weight: Tensor, R: Tensor) -> Tensor:
    """R between roots of the principal part, found by the eigenvectors of W W', another algorithm."""
    matrix = weight.flatten(1)
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    S, U = values[-3:].flip(0).sqrt(), vectors[:, -3:].flip(1)
    U = U * (U.gather(0, U.abs().argmax(0, keepdim=True))).sign()
    V = torch.diag(1 / S) @ U.T @ matrix
    return weight + (U @ torch.diag(S**0.5) @ R @ torch.diag(S**0.5) @ V).view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    base, x = hosted(kind)
    host, injection, operator = adapted(kind, "tinylora", **OPTIONS)
    v = injection.shared["v_0"].v
    assert v.shape == (4,) and not v.any()
    v.data.normal_(0, 0.5)
    copy = v.detach().clone().requires_grad_()
    effective = [between(W, sum(copy[i] * tensors["P"][i] for i in range(4))) for W, tensors in experts(kind, operator)]
    weight = torch.stack(effective) if kind == "experts" else effective[0]
    name = "layer.stack" if kind == "experts" else "layer.weight"
    stored = weight if base.get_parameter(name).shape == logical(kind, base).shape else weight.T
    ours, expected = host(x), functional_call(base, {name: stored}, (x,))
    assert difference(ours, base(x)) > 1e-3
    assert difference(ours, expected) <= 1e-10
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    assert difference(v.grad, copy.grad) <= 1e-10
    assert len(list(injection.parameters())) == 1


def test_drawn_matrices() -> None:
    """Of variance 1 / rank, others for each site and seed."""
    host = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    drawn = {}
    for seed in (42, 43):
        injection = peftcore.apply(deepcopy(host), "tinylora", target=["0", "1"], rank=8, projection_seed=seed)
        drawn[seed] = [injection.operators[path].get_buffer("P") for path in ("0", "1")]
    assert torch.equal(drawn[42][1], drawn[43][0])
    assert not torch.isclose(drawn[42][0], drawn[42][1]).any()
    assert abs(drawn[42][0].var() - 1 / 8) < 0.005


class Deep(nn.Module):
    """Seven sites, of two sizes, stored one way and the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
        self.out = Conv1D(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.out(x)


TARGET = [*(str(n) for n in range(6)), "out"]


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    assert torch.equal(operator.P.float(), layer.tinylora_P[ADAPTER])  # drawn alike
    layer.tinylora_P[ADAPTER] = operator.P
    for each in "AB":  # up to signs, which are free
        values = getattr(layer, f"tinylora_{each}")[ADAPTER]
        assert difference(values.abs(), operator.get_buffer(each).abs()) <= 1e-4
        getattr(layer, f"tinylora_{each}")[ADAPTER] = operator.get_buffer(each)
    v = layer.tinylora_v[ADAPTER][layer._tinylora_v_key[ADAPTER]]
    yield Pair(f"{site.path}.v", operator.vector.module.v, v, lambda t: t)


@pytest.mark.parametrize(("tying", "groups"), [(0.0, 7), (0.5, 4), (0.7, 2), (1.0, 1)])
@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "tinylora")
def test_beside_peft(tying: float, groups: int) -> None:
    torch.manual_seed(0)
    config = peft.TinyLoraConfig(r=3, u=5, weight_tying=tying, target_modules=TARGET)
    options = {"rank": 3, "u": 5, "tying": tying, "target": ["layers.*", "out"], "dtype": "float64"}
    both = Both(Deep().double(), "tinylora", options, config, pairs)
    for pair in both.pairs:  # what is shared comes several times, and is filled once
        pair.theirs.data.copy_(pair.ours)
    assert len(both.injection.shared) == groups
    ours = sum(p.numel() for p in both.injection.parameters())
    assert ours == sum(p.numel() for p in both.tuner.parameters() if p.requires_grad) == 5 * groups
    x = torch.randn(4, 8).double()
    for model in (both.ours, both.tuner):
        model.train()
    both.assert_same(lambda model: model(x))


def test_files_hold_the_factors_and_draw_the_rest(tmp_path: Path) -> None:
    base, x = Deep(), torch.randn(3, 8)
    for stored in (False, True):
        model = deepcopy(base)
        injection = peftcore.apply(model, "tinylora", target=TARGET, **OPTIONS, tying=0.5, store_basis=stored, seed=5)
        for parameter in injection.parameters():
            nn.init.normal_(parameter)
        injection.save(tmp_path / "adapter")
        assert any(key.endswith("P") for key in injection.state_dict()) == stored
        expected, other = model(x), deepcopy(base)
        peftcore.load(other, tmp_path / "adapter")
        assert torch.equal(other(x), expected)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="u cannot change at single sites"):
        peftcore.apply(Deep(), "tinylora", target=TARGET, **OPTIONS, overrides={"out": {"u": 2}})
