"""Riemannian preconditioned LoRA, the damping= of LoRA, as peft's optimizer trains it and as its equation says."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, hosted
from one_layer import One
from peft.optimizers import create_riemannian_optimizer
from peft_pairs import difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


@conformance("lora", hosts=["llama", "moe"], options={"*": {"alpha": 12.0, "damping": 0.01}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def two() -> Two:
    """Stored one way and the other."""
    return Two(nn.Linear(12, 6), Conv1D(9, 6))


@pytest.mark.parametrize("damping", [1e-2, 4.5])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@against("peft 0.21", "lora")
def test_trains_as_peft_does(kind: str, damping: float) -> None:
    """Five steps from the same noise, in float64."""
    torch.manual_seed(0)
    base = two().double()
    ours, target = deepcopy(base), ["first", "second"]
    options: dict[str, Any] = {"rank": 3, "alpha": 5.0, "damping": damping}
    injection = peftcore.apply(ours, "lora", target=target, dtype="float64", **options)
    theirs = peft.get_peft_model(deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=target)).double()
    layers = {name: theirs.get_submodule(f"base_model.model.{name}") for name in target}
    with torch.no_grad():
        for name, layer in layers.items():
            operator = injection.operators[name]
            layer.lora_A["default"].weight.copy_(operator.A.normal_(0, 0.1))
            layer.lora_B["default"].weight.copy_(operator.B.normal_(0, 0.1))
    start = {name: deepcopy(operator) for name, operator in injection.operators.items()}
    cls, arguments = OPTIMIZERS[kind]
    other = create_riemannian_optimizer(theirs, cls, reg=damping, **arguments)
    optimizer = injection.optimizer(cls, **arguments)
    x, wanted = torch.randn(20, 12).double(), torch.randn(20, 9).double()
    for _ in range(5):
        for model, each in ((ours, optimizer), (theirs, other)):
            (model(x) - wanted).square().mean().backward()
            each.step()
            each.zero_grad()
    for name, layer in layers.items():
        operator = injection.operators[name]
        assert difference(operator.A, layer.lora_A["default"].weight) <= 1e-10
        assert difference(operator.B, layer.lora_B["default"].weight) <= 1e-10
        assert difference(operator.A, start[name].A) >= 1e-3 and difference(operator.B, start[name].B) >= 1e-3
    assert difference(ours(x), theirs(x)) <= 1e-10


def trained(kind: str, x: Tensor, direction: Tensor, mix: Tensor | None, damping: float) -> tuple[Any, Any, Tensor]:
    """A layer with noise in its factors (mixed by `mix` and its inverse), before a step of SGD and after it."""
    host, injection, operator = adapted(kind, "lora", rank=2, alpha=2.0, damping=damping)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in (operator.A, operator.B):
            each.normal_(0, 0.3, generator=generator)
        if mix is not None:
            flat = operator.A.flatten(operator.B.dim() - 1)
            operator.A.copy_((torch.linalg.inv(mix) @ flat).view(operator.A.shape))
            operator.B.copy_(operator.B @ mix)
    before = deepcopy(operator)
    (host(x) * direction).sum().backward()
    for name, parameter in operator.named_parameters():
        before.get_parameter(name).grad = parameter.grad.clone()
    injection.optimizer(torch.optim.SGD, lr=1e-7).step()
    zero = torch.zeros(shape_of(operator)).double()
    return before, operator, operator.merged(zero) - before.merged(zero)


def shape_of(operator: Any) -> tuple[int, ...]:
    """The shape of the weight, [*experts, out, in, *kernel]."""
    experts = operator.B.dim() - 2
    return (*operator.B.shape[:-1], *operator.A.shape[experts + 1 :])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_equation(kind: str) -> None:
    """By solving, another algorithm, and of each expert by itself."""
    host, x = hosted(kind)
    direction = torch.randn(host(x).shape, generator=torch.Generator().manual_seed(2)).double()
    before, after, _ = trained(kind, x, direction, None, 0.5)
    for e in range(len(before.A)) if kind == "experts" else [...]:
        A, B = before.A[e].flatten(1), before.B[e]
        of_A = torch.linalg.solve(B.T @ B + 0.5 * torch.eye(2), before.A.grad[e].flatten(1))
        of_B = torch.linalg.solve(A @ A.T + 0.5 * torch.eye(2), before.B.grad[e].T).T
        assert difference((before.A[e].flatten(1) - after.A[e].flatten(1)) / 1e-7, of_A) <= 1e-6
        assert difference((before.B[e] - after.B[e]) / 1e-7, of_B) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_without_damping_a_step_does_not_depend_on_the_split(kind: str) -> None:
    """B P and inv(P) A are the same update, and take the same step; LoRA's own gradients do not."""
    host, x = hosted(kind)
    direction = torch.randn(host(x).shape, generator=torch.Generator().manual_seed(2)).double()
    mix = torch.tensor([[3.0, 1.0], [0.5, 0.2]]).double()
    steps = [trained(kind, x, direction, each, 0.0)[2] for each in (None, mix)]
    assert difference(steps[1], steps[0]) <= 1e-4
    damped = [trained(kind, x, direction, each, 100.0)[2] for each in (None, mix)]
    assert difference(damped[1], damped[0]) >= 0.1


def test_half_precision() -> None:
    model = One(nn.Linear(12, 7))
    injection = peftcore.apply(model, "riemannian_lora", target="layer", dtype="bfloat16")
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(2):
        model(torch.randn(5, 12)).sum().backward()
        optimizer.step()
    operator = injection.operators["layer"]
    assert operator.B.dtype == torch.bfloat16 and operator.B.isfinite().all() and operator.B.any()


def test_sites_may_differ() -> None:
    """A site of LoRA-FA and a plain one beside one that is preconditioned."""
    model, inputs = HOSTS["llama"].build()
    some: dict[str, Any] = {"*q_proj": {"trained": "B", "damping": None}, "*k_proj": {"damping": None}}
    injection = peftcore.apply(model, "riemannian_lora", target=["attn.q", "attn.k", "attn.v"], rank=2, overrides=some)
    assert injection.method.name == "lora" and injection.config.damping == 1e-6
    rule: Any = injection.method.gradient_rule(injection)
    model(**inputs).logits.square().mean().backward()
    for path, operator in injection.operators.items():
        changed = [p for p in operator.parameters() if p.grad is not None and rule.project(p.grad, p) is not p.grad]
        assert len(changed) == {"q": 1, "k": 0, "v": 2}[path[-6]], path


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="trained='B' trains one with its own rule"):
        peftcore.apply(One(nn.Linear(12, 7)), "lora_fa", target="layer", damping=0.1)
    with pytest.raises(ConfigError, match="damping"):
        peftcore.apply(One(nn.Linear(12, 7)), "lora", target="layer", damping=-1.0)
    injection = peftcore.apply(One(nn.Linear(6, 4)), "lora", target="layer")
    assert injection.method.gradient_rule(injection) is None
