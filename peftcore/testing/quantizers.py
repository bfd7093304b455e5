"""The conformance kit for quantization schemes. It checks that a scheme, and its `QuantizedLayer`, do what methods and
users rely on.

    @quantizer_conformance("nf4", double_quant=True, declared={"pickles_compute_the_same": "why"})
    def test_conformance(check):
        check()

Without pytest: ``for result in check_quantizer("nf4"): print(result)``. The message of the first result is the
quantization error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError
from peftcore.injection.injection import Injection
from peftcore.injection.quantization import Scheme, quantize, scheme, scheme_class
from peftcore.registry.plugins import layer_of
from peftcore.testing.doors import Result, judged, parametrized
from peftcore.testing.kit import TOLERANCES, Check, Expecting, NotApplicable, fill
from peftcore.testing.tools import Kinds, Trace, differences, trace

LINEAR = ("first", "second")


class TwoLinears(nn.Module):
    """Two linear layers, one with a bias, with sizes that are multiples of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output [..., 64] for an input [..., 64]."""
        y: Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return y


@dataclass(frozen=True)
class QuantizerCase(Expecting):
    """A scheme with options, which is checked on small hosts with fixed weights."""

    name: str
    options: Mapping[str, Any]
    tolerance: float | None = None

    @property
    def label(self) -> str:
        return self.name + "".join(f" {key}={value}" for key, value in self.options.items())

    @property
    def subject(self) -> type:
        return scheme_class(self.name)

    @property
    def scheme(self) -> Scheme:
        """The quantization scheme, with the options of the case."""
        return scheme(self.name, **self.options)

    def values(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return normally distributed values, which depend only on the seed."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Any:
        """Build a host that is not quantized; all calls build equal ones."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return TwoLinears().to(dtype).eval()

    def packed(self, dtype: torch.dtype = torch.float32) -> Any:
        """Build the host of `dense`, and quantize it."""
        return quantize(self.dense(dtype), self.name, **self.options)

    def twin(self, packed: nn.Module) -> Any:
        """Build a host in float32 with the dequantized weights of a quantized host."""
        twin = self.dense()
        for path in LINEAR:
            module: Any = twin.get_submodule(path)
            module.weight = nn.Parameter(self.read(packed.get_submodule(path)).to(torch.float32, copy=True))
            bias: Any = packed.get_submodule(path).bias
            module.bias = None if bias is None else nn.Parameter(bias.detach().float())
        return twin

    def read(self, module: nn.Module) -> Tensor:
        """Return the weight of a module, dequantized if the module is quantized."""
        weight = layer_of(module, "weight").read(module, "weight")
        assert weight is not None
        return weight.detach()

    def adapt(self, model: nn.Module, kind: str) -> Injection:
        """Apply operators of one kind (see `tools.KINDS`) to both layers, and add noise to their tensors."""
        injection = peftcore.apply(model, Kinds, kind=kind, target=list(LINEAR), seed=0)
        fill(injection)
        return injection

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the output of a model in eval mode, for a fixed input."""
        with torch.no_grad():
            output: Tensor = model.eval()(self.values(3, 5, 64, seed=1, dtype=dtype))
        return output

    def train(self, model: nn.Module, injection: Injection) -> dict[str, Tensor]:
        """Return the gradients of the operators' parameters after one backward, by name."""
        injection.model.zero_grad()
        model.train()(self.values(3, 5, 64, seed=1)).square().mean().backward()
        model.eval()
        named = {f"{path}.{name}": p for path, module in injection.modules() for name, p in module.named_parameters()}
        self.expect(all(p.grad is not None for p in named.values()), "a parameter has no gradient")
        return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}

    def state(self, model: nn.Module) -> Trace:
        """Return the state of a host (see `tools.trace`), with its dequantized weights."""
        return {**trace(model), **{f"weight of {path}": self.read(model.get_submodule(path)) for path in LINEAR}}

    def expect_unchanged(self, before: Trace, model: nn.Module, what: str, passing: str | tuple[str, ...] = ()) -> None:
        """Fail unless the state of the host equals `before`, the result of an earlier call of `state`."""
        wrong = differences(before, self.state(model), passing)
        self.expect(not wrong, f"{what}: changed: {wrong}")

    def expect_near(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Fail unless two tensors agree within three times the tolerance of their dtype, or within the declared
        `tolerance` if that is larger."""
        factor = 3.0 if self.tolerance is None else max(3.0, self.tolerance / TOLERANCES[expected.dtype])
        self.expect_close(actual, expected, what, factor)

    def error(self, weight: Tensor) -> float:
        """Return the relative error of quantizing a weight: the norm of the difference, divided by the norm of the
        weight."""
        chosen = self.scheme
        off = chosen.layer.unpack(chosen.module(weight)).float() - weight.float()
        return float(off.norm() / weight.float().norm())


QUANTIZER_CHECKS: list[Check] = []
"""All checks of quantizers."""


def check(
    promise: str, *, cause: str, remedy: str
) -> Callable[[Callable[[QuantizerCase], Any]], Callable[[QuantizerCase], Any]]:
    """Decorator that registers a function as a check of quantizers."""

    def file(function: Callable[[QuantizerCase], Any]) -> Callable[[QuantizerCase], Any]:
        QUANTIZER_CHECKS.append(Check(function, promise, cause, remedy))
        return function

    return file


def check_quantizer(
    name: str, *, tolerance: float | None = None, declared: Mapping[str, str] | None = None, **options: Any
) -> list[Result]:
    """Run all checks on a quantization scheme of a plugin, and return their results.

    Args:
        name: the name of the scheme.
        tolerance: for schemes that quantize inputs too. It is the largest accepted difference of outputs and gradients
            from those with the dequantized weight, relative to the largest value.
        declared: checks that the scheme is known to fail, by name, each with the reason. If such a check passes, that
            counts as a failure.
        options: the scheme's options.

    Raises:
        ConfigError: `declared` contains a check that does not exist.
    """
    expected, runs = declared or {}, _runs(name, tolerance, declared or {}, options)
    case = QuantizerCase(name, options, tolerance)
    return [judged(each, case.label, runs[each.name], expected.get(each.name)) for each in QUANTIZER_CHECKS]


def quantizer_conformance(
    name: str, *, tolerance: float | None = None, declared: Mapping[str, str] | None = None, **options: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that turns a test function into one pytest test for each check of quantizers. The function gets an
    argument `check`; calling it without arguments runs the check.

    The arguments are those of `check_quantizer`. If a check in `declared` passes, its test fails. If a package that the
    scheme needs is not installed, the tests are skipped.

    Raises:
        ConfigError: as in `check_quantizer`; it is raised when pytest collects the tests.
    """
    return parametrized(_runs(name, tolerance, declared or {}, options), declared or {})


def _runs(
    name: str, tolerance: float | None, declared: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, Callable[[], str | None]]:
    case = QuantizerCase(name, options, tolerance)
    stray = [each for each in declared if each not in {check.name for check in QUANTIZER_CHECKS}]
    if stray:
        raise ConfigError(f"{name}: there is no check {', '.join(stray)}")
    return {each.name: functools.partial(_run, each, case) for each in QUANTIZER_CHECKS}


def _run(check: Check, case: QuantizerCase) -> str | None:
    missing = scheme_class(case.name).missing()
    if missing:
        raise NotApplicable(f"{case.name} needs {', '.join(missing)}")
    return check(case)
