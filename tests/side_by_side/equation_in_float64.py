"""An equation written a second time, plainly and in float64, beside what the method computes: the helper of the tests
of methods that change a weight. Layers that no other library adapts are among the kinds.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from one_layer import One
from peft_pairs import difference
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.testing import HOSTS

EXACT = 1e-10
"""Accepted relative difference, in float64."""
MOVED = 1000 * EXACT
"""The outputs must have moved by this much, or their being equal proves nothing."""
Equation = Callable[[Tensor, dict[str, Tensor]], Tensor]
"""An effective weight [out, in, *kernel] from a weight and the tensors of an operator; of one expert, in a stack."""


class Stack(nn.Module):
    """Three experts in one tensor, each for some rows of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 7, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,eni->eno", self.stack, x)


@dataclass(frozen=True)
class Kind:
    """A kind of layer: how it is made, an input, whether it is stored transposed, and the name of its weight."""

    build: Callable[[], tuple[nn.Module, Tensor]]
    transposed: bool = False
    target: str = "layer"
    tensor: str = "layer.weight"


KINDS = {
    "linear": Kind(lambda: (nn.Linear(12, 7), torch.randn(2, 5, 12))),
    "wide": Kind(lambda: (nn.Linear(6, 11, bias=False), torch.randn(9, 6))),
    "conv1d-of-transformers": Kind(lambda: (Conv1D(7, 12), torch.randn(2, 5, 12)), transposed=True),
    "convolution": Kind(lambda: (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), torch.randn(2, 4, 7, 6))),
    "grouped": Kind(lambda: (nn.Conv1d(6, 9, 3, groups=3, padding=1), torch.randn(2, 6, 9))),
    "embedding": Kind(lambda: (nn.Embedding(9, 5), torch.randint(9, (4, 9))), transposed=True),
    "experts": Kind(lambda: (Stack(), torch.randn(3, 5, 12)), target="layer.stack", tensor="layer.stack"),
}


def hosted(kind: str) -> tuple[One, Tensor]:
    """A host of one layer of that kind in float64, always the same, and an input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = KINDS[kind].build()
    return One(layer).double().requires_grad_(False), x.double() if x.is_floating_point() else x


def logical(kind: str, host: One) -> Tensor:
    """The weight of the host's layer as [out, in, *kernel] (of each expert)."""
    weight = host.get_parameter(KINDS[kind].tensor).detach()
    return weight.T if KINDS[kind].transposed else weight


def adapted(kind: str, method: str, **options: Any) -> tuple[One, peftcore.Injection, Any]:
    """The host with the method in float64, its injection and the one operator, as they start."""
    host, _ = hosted(kind)
    injection = peftcore.apply(host, method, target=KINDS[kind].target, dtype="float64", seed=0, **options)
    (operator,) = injection.operators.values()
    return host, injection, operator


def experts(kind: str, operator: nn.Module) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The base weight [out, in, *kernel] of each expert, and its part of the operator's tensors; one for all else."""
    weight, tensors = logical(kind, hosted(kind)[0]), dict(operator.named_parameters()) | dict(operator.named_buffers())
    if kind != "experts":
        return [(weight, tensors)]
    return [(matrix, {name: t[e] for name, t in tensors.items()}) for e, matrix in enumerate(weight)]


@torch.no_grad()
def fill(operator: nn.Module) -> None:
    """Every tensor that trains becomes N(0, 0.1), always the same."""
    generator = torch.Generator().manual_seed(1)
    for parameter in operator.parameters():
        parameter.normal_(0, 0.1, generator=generator)


def copies(operator: nn.Module) -> dict[str, Tensor]:
    """All that trains, once more, for the equation."""
    return {name: p.detach().clone().requires_grad_() for name, p in operator.named_parameters()}


def assert_equation(kind: str, method: str, equation: Equation, **options: Any) -> None:
    """With all that trains N(0, 0.1), outputs, gradients and merged weights are those of the equation."""
    base, x = hosted(kind)
    _, injection, operator = adapted(kind, method, **options)
    fill(operator)
    copy = deepcopy(operator)
    effective = [equation(weight, tensors) for weight, tensors in experts(kind, copy)]
    effective = torch.stack(effective) if kind == "experts" else effective[0]
    stored = effective.T if KINDS[kind].transposed else effective
    assert_weight(base, x, injection, stored, dict(copy.named_parameters()), tensor=KINDS[kind].tensor)


def assert_weight(
    base: nn.Module,
    x: Tensor,
    injection: peftcore.Injection,
    stored: Tensor,
    tensors: dict[str, Tensor],
    tensor: str = "layer.weight",
    exact: float = EXACT,
    moved: float = MOVED,
) -> None:
    """Outputs, gradients and merged weight are those of a weight that was made of copies of the operator's tensors."""
    model, (operator,) = injection.model, injection.operators.values()
    ours, expected = model(x), functional_call(base, {tensor: stored}, (x,))
    assert difference(ours, base(x)) >= moved, "the adapter hardly moved the output"
    assert difference(ours, expected) <= exact
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    assert tensors.keys() == dict(operator.named_parameters()).keys()
    for name, copy in tensors.items():
        assert copy.grad.abs().max() > 0, f"{name} gets no gradient"
        assert difference(operator.get_parameter(name).grad, copy.grad) <= exact, f"the gradient of {name} is another"
    injection.bake()
    assert difference(model.get_parameter(tensor), stored) <= exact


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 7), (2, 3, 4, 12)),
    "linear-no-bias": (lambda: nn.Linear(12, 7, bias=False), (5, 12)),
    "transformers-conv1d": (lambda: Conv1D(7, 12), (5, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2), (2, 4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(8, 6, (3, 1), groups=2), (2, 8, 5, 4)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 3, 3)),
    "embedding": (lambda: nn.Embedding(9, 8), (2, 5)),
}
"""Layers and shapes of their inputs, for equations that see to the layout of weights themselves."""
LACKING = ("conv1d", "conv2d", "grouped", "transposed", "embedding")
"""Those that peft's methods mostly lack."""


def frozen(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[One, Tensor]:
    """A host of one layer in float64, and an input of that shape."""
    host = One(build()).double().requires_grad_(False)
    table = isinstance(host.layer, nn.Embedding)
    return host, torch.randint(host.layer.num_embeddings, shape) if table else torch.randn(shape).double()


EXPERTS = "model.layers.0.mlp.experts.down_proj"


def merged_experts(
    method: str, fill: Callable[[Any], Any], **options: Any
) -> tuple[Any, list[tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """The operator at a stack of experts, and of each expert the weight before and after a merge and its tensors."""
    model, _ = HOSTS["moe"].build()
    before = model.double().get_parameter(EXPERTS).detach().clone()
    target = f"*.{EXPERTS.removeprefix('model.')}"
    injection = peftcore.apply(model, method, target=target, dtype="float64", **options)
    operator = injection.operators[EXPERTS]
    with torch.no_grad():
        fill(operator)
    injection.merge()
    pairs = enumerate(zip(before, model.get_parameter(EXPERTS), strict=True))
    own = dict(operator.named_parameters())
    return operator, [(old, new, {name: p[expert] for name, p in own.items()}) for expert, (old, new) in pairs]
