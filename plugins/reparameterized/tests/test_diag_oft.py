"""Diag-OFT of LyCORIS, `side="outputs"` of OFT with `constraint` and `rescaled`: the promises of the kit, the numbers
of the real LyCORIS with gradients, the equation in float64, and that limits hold."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from equation_in_float64 import LAYERS, assert_weight, copies, frozen
from lycoris.modules.diag_oft import DiagOFTModule
from one_layer import One
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import against, conformance

SIZE = 4
ABOVE = torch.triu_indices(SIZE, SIZE, 1)
EXACT, NEAR = 1e-12, 1e-7
"""Accepted relative difference to LyCORIS, and with its constraint, which adds 1e-8 to the norm that it divides by."""


@conformance("oft", options={"*": {"side": "outputs", "block_size": SIZE, "rescaled": True, "constraint": 0.01}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def theirs(layer: nn.Module, **options: Any) -> Any:
    """LyCORIS's module for a layer of 16 outputs, in float64."""
    return DiagOFTModule("layer", layer, 1.0, SIZE, **options).double()


@torch.no_grad()
def same(module: Any, operator: Any) -> None:
    """Fill both with the same numbers: what stands below the diagonal of theirs is taken off what stands above."""
    nn.init.normal_(module.oft_blocks, std=0.1)
    Q = module.oft_blocks - module.oft_blocks.mT
    operator.K.copy_(Q[..., ABOVE[0], ABOVE[1]])
    if operator.gain is not None:
        nn.init.normal_(operator.gain, 1.0, 0.1)
        module.rescale.copy_(operator.gain.view(module.rescale.shape))


HOSTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 16), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 16, 3, stride=2), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 16, (3, 2), padding=(1, 0), dilation=2), (2, 6, 7, 6)),
    "grouped": (lambda: nn.Conv2d(8, 16, 3, groups=2), (2, 8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 16, (1, 3, 2)), (1, 4, 2, 4, 4)),
}
FORMS: dict[str, dict[str, Any]] = {
    "free": {},
    "rescaled": {"rescaled": True},
    "constrained": {"constraint": 0.02},
    "wide": {"constraint": 9.0, "rescaled": True},  # a limit that is not reached
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", HOSTED)
@against("lycoris 4.1", "oft")
def test_beside_lycoris(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients of inputs and of all that trains, and merged weights, in training."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # it inverts in float32 whatever it is given
    near = NEAR if "constraint" in FORMS[form] else EXACT
    base, x = frozen(*HOSTED[name])
    module = theirs(deepcopy(base.layer), **FORMS[form])
    model = deepcopy(base)
    options = {"side": "outputs", "block_size": SIZE, "dtype": "float64", **FORMS[form]}
    injection = peftcore.apply(model, "oft", target="layer", **options)
    (operator,) = injection.operators.values()
    same(module, operator)
    before, inputs = base(x), [x.clone().requires_grad_() for _ in range(2)]
    ours, its = model.train()(inputs[0]), module.train()(inputs[1])
    assert difference(its, before) > 0.01
    assert difference(ours, its) <= near
    direction = torch.randn_like(ours)
    for output in (ours, its):
        (output * direction).sum().backward()
    assert difference(inputs[0].grad, inputs[1].grad) <= near
    above = module.oft_blocks.grad[..., ABOVE[0], ABOVE[1]]  # Q = X - X', so each entry of X has that of K, or minus it
    assert operator.K.grad.abs().max() > 0
    assert difference(operator.K.grad, above) <= near
    if operator.gain is not None:
        assert difference(operator.gain.grad, module.rescale.grad.flatten()) <= near
    injection.bake()
    assert difference(model.layer.weight, module.get_merged_weight()[0]) <= near


def turned(tensors: dict[str, Tensor], size: int, width: int, limit: float | None) -> Tensor:
    """The whole R [width, width] with a limit to the norm of all K, by the entries of a block or of each."""
    K = torch.block_diag(*(_skew(entries, size) for entries in tensors["K"].expand(width // size, -1)))
    norm = K.square().sum().sqrt()
    if limit is not None and norm > limit:
        K = K * limit / norm
    one = torch.eye(width).double()
    return (one - K) @ torch.linalg.inv(one + K)


def _skew(entries: Tensor, size: int) -> Tensor:
    upper = torch.zeros(size, size).double().index_put(tuple(torch.triu_indices(size, size, 1)), entries)
    return upper - upper.T


@pytest.mark.parametrize("share", [False, True], ids=["blocks", "shared"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped", "embedding"])
def test_equation(name: str, side: str, share: bool) -> None:
    """Gains and a limit that is reached, on both sides, and where one block stands for all."""
    base, x = frozen(*LAYERS[name])
    model = deepcopy(base)
    options = {"side": side, "block_size": 4, "block_share": share, "constraint": 0.01, "rescaled": True}
    injection = peftcore.apply(model, "oft", target="layer", dtype="float64", **options)
    (operator,) = injection.operators.values()
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tensors = copies(operator)
    weight, table = base.layer.weight, name == "embedding"
    rows = weight.T if table else weight.flatten(1)  # [out, in]
    outputs = table or side == "outputs"
    width = rows.shape[0 if outputs else 1]
    R = turned(tensors, operator.size, width, 0.01 * width)
    effective = tensors["gain"][:, None] * (R @ rows if outputs else rows @ R.T)
    effective = effective.T if table else effective.view(weight.shape)
    assert_weight(base, x, injection, effective, tensors, exact=1e-11, moved=1e-3)


@pytest.mark.parametrize("entries", [0.1, 1e3])
def test_no_rotation_goes_beyond_its_limit(entries: float) -> None:
    layer = nn.Linear(12, 16, bias=False).double()
    before = layer.weight.detach().clone()
    options = {"side": "outputs", "block_size": SIZE, "constraint": 0.01, "dtype": "float64"}
    injection = peftcore.apply(One(layer), "oft", target="layer", **options)
    (operator,) = injection.operators.values()
    nn.init.normal_(operator.K, std=entries)
    assert operator.entries().detach().norm() * math.sqrt(2) == pytest.approx(0.01 * 16)
    injection.merge()
    assert difference(layer.weight.T @ layer.weight, before.T @ before) <= 1e-12
    assert difference(layer.weight, before) > 1e-3


def test_two_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="eps and constraint both limit the rotations"):
        peftcore.apply(One(nn.Linear(12, 16)), "oft", target="layer", eps=0.1, constraint=0.1)
