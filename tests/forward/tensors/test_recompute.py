"""Effective tensors of modules that do more than one product: made again in backward, and nothing else is."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_toys import Shift, ShiftOperator
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.layers.kernels import saves_elsewhere

TELLS = pytest.mark.skipif(saves_elsewhere(), reason="this torch cannot say whether hooks of others are there")
X = torch.linspace(-1, 1, 20).view(5, 4)


class Experts(nn.Module):
    """Two products for each of three experts, of parameters that it takes apart by itself, and in a way for which
    nothing can stand in (`peftcore.forward.tensors.expert_updates`)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4) / 2)
        self.down = nn.Parameter(torch.randn(3, 4, 6) / 2)
        self.ran: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.ran.append(len(x))
        hidden = torch.tanh(torch.einsum("ti,ehi->eth", x, self.up))
        return torch.einsum("eth,eoh->eto", hidden, self.down).sum(0)


class Host(nn.Module):
    """A layer, and experts, perhaps below a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = Experts()
        self.around: Callable[..., Tensor] = lambda module, x: module(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.experts, self.first(x))


def adapted(
    method: Any = "lora", before: Callable[[Host], Any] = lambda model: None, **options: Any
) -> tuple[Host, peftcore.Injection]:
    torch.manual_seed(0)
    model = Host()
    before(model)
    injection = peftcore.apply(model, method, target=["experts.up", "experts.down"], **options)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, injection


def gradients(injection: peftcore.Injection, output: Tensor, **how: Any) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), list(injection.parameters()), **how))


class Made:
    """An effective tensor, as long as it lives, and how many others lived when it was made."""

    def __init__(self, tensor: Tensor, before: list["Made"]) -> None:
        self.others = sum(each() is not None for each in before)
        self.memory = weakref.ref(tensor.untyped_storage())

    def __call__(self) -> torch.UntypedStorage | None:
        return self.memory()


def made(monkeypatch: pytest.MonkeyPatch, injection: peftcore.Injection) -> list[Made]:
    """The effective tensors that are made from here on."""
    found: list[Made] = []
    operator = type(next(iter(injection.operators.values())))
    merged = operator.merged

    def noting(self: Any, weight: Tensor) -> Tensor:
        result = merged(self, weight)
        found.append(Made(result, found))
        return result

    monkeypatch.setattr(operator, "merged", noting)
    return found


@pytest.mark.parametrize("method", ["lora", "glora", "dora", "loha", "oft", "hira", "fourierft"])
def test_gradients_are_those_of_the_whole_module_again(method: str) -> None:
    model, injection = adapted(method, **({"n_frequency": 5} if method == "fourierft" else {}))
    found = []
    for low_memory in (False, True):
        injection.low_memory = low_memory
        model.experts.ran.clear()
        found.append(gradients(injection, model(X)))
        repeats = low_memory or saves_elsewhere()  # which old versions of torch cannot tell
        assert len(model.experts.ran) == 1 + (repeats and method != "lora")
    assert all(gradient.any() for gradient in found[0])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_gradients_are_those_of_the_equation_in_float64() -> None:
    model, injection = adapted(dtype="float64")
    model.double()
    output = model(X.double())
    of_input = model.first(X.double())
    effective = []
    for name in ("up", "down"):
        operator = injection.operators[f"experts.{name}"]
        A, B, scale = operator.factors()
        effective.append(getattr(model.experts, name) + scale * torch.einsum("eor,eri->eoi", B, A))
    outputs = [torch.tanh(of_input @ up.mT) @ down.mT for up, down in zip(*effective, strict=True)]
    expected = torch.stack(outputs).sum(0)
    torch.testing.assert_close(output, expected)
    for one, other in zip(gradients(injection, output), gradients(injection, expected), strict=True):
        torch.testing.assert_close(one, other)


@TELLS
def test_they_live_neither_between_forward_and_backward_nor_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, injection = adapted()
    living = made(monkeypatch, injection)
    gc.disable()  # nothing waits for it
    try:
        output = model(X)
        assert len(living) == 2 and not any(each() for each in living)
        gradients(injection, output)
        assert len(living) == 4 and not any(each() for each in living)
    finally:
        gc.enable()


@TELLS
def test_in_backward_each_goes_with_the_last_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, injection = adapted()
    living = made(monkeypatch, injection)
    output = model(X.clone().requires_grad_())  # so that the inputs of experts have gradients, too
    gc.disable()
    try:
        output.square().sum().backward()
    finally:
        gc.enable()
    assert [each.others for each in living] == [0, 1, 0, 0]  # forward needs both at once, backward one after the other


def test_backward_again_and_of_backward() -> None:
    model, injection = adapted()
    output = model(X)
    first = gradients(injection, output, retain_graph=True)
    parts = [torch.autograd.grad(output.square().sum(), p, retain_graph=True)[0] for p in injection.parameters()]
    again = gradients(injection, output)
    for one, *others in zip(first, parts, again, strict=True):
        assert all(torch.equal(one, other) for other in others)
    second = []
    for low_memory in (False, True):
        injection.low_memory = low_memory
        first = gradients(injection, model(X), create_graph=True)
        second.append(torch.autograd.grad(sum(each.square().sum() for each in first), list(injection.parameters())))
    assert all(each.any() for each in second[0])
    for one, other in zip(*second, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_below_a_checkpoint_of_the_host_nothing_is_kept_from_it(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, injection = adapted()
    expected = gradients(injection, model(X))
    model.around = lambda module, x: checkpoint(module, x.requires_grad_(), use_reentrant=reentrant)
    living = made(monkeypatch, injection)
    output = model(X)
    assert not any(each() for each in living)
    if reentrant:  # which knows no torch.autograd.grad
        output.square().sum().backward()
        found = [parameter.grad for parameter in injection.parameters()]
    else:
        found = gradients(injection, output)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_below_hooks_of_others_the_whole_module_runs_again() -> None:
    """Hooks of ours would keep from them what the module saves. Of what may stand in nothing runs again."""
    for method in ("dora", "lora"):
        model, injection = adapted(method)
        expected = gradients(injection, model(X))
        for hooks in (save_on_cpu(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)):
            with hooks:
                output = model(X)
            model.experts.ran.clear()
            assert all(torch.equal(a, b) for a, b in zip(gradients(injection, output), expected, strict=True))
            assert model.experts.ran == ([5] if method == "dora" else [])


class Halved(Experts):
    """Changes its own parameters as it runs, as embeddings with a max_norm do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.div_(2)
        return super().forward(x)


def test_what_the_module_has_changed_is_saved() -> None:
    model, injection = adapted(before=lambda model: setattr(model.experts, "__class__", Halved))
    found = []
    for low_memory in (False, True):
        injection.low_memory = low_memory
        x = X.clone().requires_grad_()
        output = model(x).square().sum()
        found.append([output, *torch.autograd.grad(output, [x, *injection.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class NoisyOperator(ShiftOperator):
    """Its weight is drawn anew in each forward."""

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) * nn.functional.dropout(torch.ones_like(weight), 0.5)


def test_what_is_drawn_is_the_same_in_backward() -> None:
    model, injection = adapted(Shift)
    for operator in injection.operators.values():
        operator.__class__ = NoisyOperator
    found = []
    for low_memory in (False, True):
        injection.low_memory = low_memory
        torch.manual_seed(3)
        found.append(gradients(injection, model(X)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_under_autocast_no_copy_in_its_dtype_is_saved() -> None:
    model, injection = adapted("dora")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(X)
    model.experts.ran.clear()
    output.float().sum().backward()
    assert model.experts.ran == [5]  # the whole module, again
    assert all(parameter.grad.any() for parameter in injection.parameters())  # type: ignore[union-attr]


def test_frozen_operators_let_the_inputs_gradient_through() -> None:
    model, injection = adapted()
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    for parameter in injection.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(model(x).sum(), x)[0], expected)
