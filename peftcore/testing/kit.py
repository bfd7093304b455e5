"""The base of the conformance kit: `Host`, `Case`, `Check`, and the list of all checks.

A check is a function whose name states what it tests. It gets a `Case` (one method on one tiny host), and raises
`CheckFailed` if the method fails. The message names the method, the host, the promise that does not hold, the usual
cause and what to do (see `failures`). The tags of a method determine which checks apply, never its name. The tolerances
of all checks are defined here, by dtype.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

import peftcore
from peftcore.contract.batches import Labelled
from peftcore.contract.method import Method, Tags
from peftcore.errors import TargetError, UnsupportedSite
from peftcore.injection.injection import Injection
from peftcore.surgery.seeding import preserved_rng
from peftcore.testing.copies import Copies
from peftcore.testing.failures import CheckFailed, explained

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""The largest accepted difference, relative to the largest value of the expected tensor, by dtype."""
ALL = "PEFTCORE_TEST_ALL"
"""Environment variable: if it is 1, every method runs on every host."""
FILL = 0.1
"""The standard deviation of the noise that is added to operator tensors. Without noise, a fresh LoRA-like adapter would
not change the base's outputs."""


class NotApplicable(Exception):
    """Raised if a check cannot run on a case: for example, because the method has no sites in the host, or because the
    host's package is not installed. The message is the reason."""


Build = Callable[[], tuple[nn.Module, dict[str, Any]]]
"""Type of functions that build a host and its inputs."""


@dataclass(frozen=True)
class Host:
    """A tiny model on which checks run.

    Attributes:
        name: the name of the host in test ids.
        build: builds the model, in eval mode, and its inputs as keyword arguments. The caller seeds the random numbers.
        output: returns the tensor that checks compare, from the model's result.
        fallback: the target for methods whose default targets match nothing in the host.
        shallow: builds the host with a single layer, for slow checks such as compiling; None if it has only one layer.
        in_double: changes the model so that it can run in float64; None if no change is needed.
        like: the name of another host. Checks that are limited to that host run on this one too.
    """

    name: str
    build: Build
    output: Callable[[Any], Tensor]
    fallback: Any = None
    shallow: Build | None = None
    in_double: Callable[[Any], None] | None = None
    like: str | None = None


def _nothing(*_: Any) -> Any:
    raise NotApplicable("the check finds hosts by itself")


ANYWHERE = Host("task", _nothing, _nothing)
"""The placeholder host of checks that choose their hosts themselves. Options for these hosts are passed under its name,
"task"."""


@functools.lru_cache(maxsize=64)
def _prototype(build: Build) -> Copies[tuple[nn.Module, dict[str, Any]]]:
    """Build a host once, with a fixed seed, and return an object that copies it. A copy takes a tenth of the time of
    building."""
    with preserved_rng():
        torch.default_generator.manual_seed(0)
        return Copies(build())


Context = Callable[[nn.Module, Tensor], Mapping[str, Any]]
"""Type of functions that get a host and pictures [rows or 1, 1, 16, 16], and return the arguments of
``peftcore.call(model, ...)``."""


class Expecting:
    """Base class of cases, with the assertions that all checks use."""

    @property
    def label(self) -> str:
        """Return the name of the case in messages: the method or scheme that is checked, and the host."""
        raise NotImplementedError

    @property
    def subject(self) -> type:
        """Return the class of the method or scheme that is checked."""
        raise NotImplementedError

    def expect(self, holds: bool, what: str) -> None:
        """Fail the check unless `holds`.

        Raises:
            CheckFailed: `holds` is False. The message is `what`; `Check` adds an explanation.
        """
        if not holds:
            raise CheckFailed(what)

    def expect_close(self, actual: Tensor, expected: Tensor, what: str, factor: float = 1.0) -> None:
        """Fail unless two tensors agree within the tolerance of their dtype times `factor`. Use a larger `factor` for
        sums of many rounding errors."""
        tolerance = TOLERANCES[expected.dtype] * factor
        scale = max(expected.abs().max().item(), 1e-3)
        error = (actual.double() - expected.double()).abs().max().item() / scale
        self.expect(
            actual.shape == expected.shape and error <= tolerance,
            f"{what}: relative error {error:.2e} > {tolerance:.0e}",
        )

    def expect_equal(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Fail unless the tensors are equal bit by bit."""
        self.expect(torch.equal(actual, expected), f"{what}: not the same to the bit")

    def expect_moved(self, actual: Tensor, base: Tensor, what: str) -> None:
        """Fail unless the output differs from `base` by more than 100 times the tolerance. Otherwise a comparison of
        outputs would not test the adapter."""
        scale = max(base.abs().max().item(), 1e-3)
        moved = (actual.double() - base.double()).abs().max().item() / scale
        self.expect(moved > 100 * TOLERANCES[base.dtype], f"{what}: moved by {moved:.2e} only")


@dataclass
class Case(Expecting):
    """One method on one host."""

    method: type[Method]
    """The method that is checked."""
    host: Host
    """The host that the method is checked on."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method for this host (``add_missing_bias`` on hosts without biases)."""
    context: Context | None = None
    """Returns the arguments of ``peftcore.call``, for methods that need them in every call."""
    claimed: Tags | None = None
    """The tags of the preset, if a preset is checked; None for a method."""

    @property
    def label(self) -> str:
        return f"{self.method.name} on {self.host.name}"

    @property
    def subject(self) -> type:
        return self.method

    @property
    def tags(self) -> Tags:
        """The tags of the method or preset that is checked."""
        return self.method.tags if self.claimed is None else self.claimed

    @cached_property
    def looks_at_data(self) -> bool:
        """True if the method needs data in `apply`, with the options of this case."""
        return self.method.asks_for_data(self.options)

    def fresh(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
        """Build a new host and its inputs. All calls return equal ones. Floating-point inputs have `dtype`."""
        return self._built(self.host.build, dtype)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The options of this case that are options of the method, without the arguments `target` and `train` of
        `apply`."""
        return {name: value for name, value in self.options.items() if name in self.method.Config.model_fields}

    @cached_property
    def inapplicable(self) -> str | None:
        """Return the reason why the method cannot be applied to the host, or None if it can."""
        try:
            model, _ = self.fresh()
            self.apply(model)
        except (TargetError, UnsupportedSite, NotApplicable) as error:
            return str(error)
        return None

    def shallow(self) -> tuple[nn.Module, dict[str, Any]]:
        """Build the one-layer version of the host and its inputs, if the method can be applied to it; otherwise the
        whole host."""
        if self.host.shallow is not None:
            with contextlib.suppress(TargetError):
                self.apply(self._built(self.host.shallow)[0])
                return self._built(self.host.shallow)
        return self.fresh()

    def _built(self, build: Build, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
        model, inputs = _prototype(build)()
        cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        if dtype is torch.float64 and self.host.in_double is not None:
            self.host.in_double(model)
        return model.to(dtype).eval(), cast

    def apply(self, model: nn.Module, **changes: Any) -> Injection:
        """Apply the method with its default targets, or with the host's `fallback` if these match nothing. Also set the
        arguments of ``peftcore.call`` that the method needs."""
        injection = self.apply_alone(model, **changes)
        self.tell(model)
        return injection

    def apply_alone(self, model: nn.Module, **changes: Any) -> Injection:
        """Apply the method as `apply` does, but do not set the arguments of ``peftcore.call``."""
        curious = self.method.asks_for_data({**self.options, **changes})  # changes may make it one that does not
        _, inputs = self.fresh(next(model.parameters()).dtype) if curious else (None, {})
        data = self.batches(lambda host: self.run(host, inputs), inputs) if curious else {}
        arguments = {**data, **self.options, **changes}
        return self._applied(model, arguments)

    def _applied(self, model: nn.Module, arguments: Mapping[str, Any]) -> Injection:
        if "target" in arguments or self.host.fallback is None:
            return peftcore.apply(model, self.method, **arguments)
        try:
            return peftcore.apply(model, self.method, **arguments)
        except TargetError:
            return peftcore.apply(model, self.method, target=self.host.fallback, **arguments)

    def tell(self, model: nn.Module) -> None:
        """Set the arguments of ``peftcore.call`` that the method needs, for all further calls of the model. They are
        computed from one picture for all rows."""
        if self.context is not None:
            picture = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(3))
            there = next(model.parameters()).device
            peftcore.call(model, **self.context(model, picture.to(there)))

    def batches(self, run: Callable[[nn.Module], Tensor], inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the argument ``data`` of `apply` if the method needs data; otherwise an empty dictionary. The data is
        two batches. The loss of each is computed from one half of the values that `run` returns. Each batch has labels
        of two classes for the rows of `inputs`."""
        rows = next((len(each) for each in (inputs or {}).values() if isinstance(each, Tensor) and each.dim()), 0)

        def batch(half: int) -> Labelled:
            labels = (torch.arange(rows) + half) % 2
            return Labelled(lambda model: run(model).flatten()[half::2].square().mean(), labels)

        return {"data": [batch(0), batch(1)]} if self.looks_at_data else {}

    def filled(self, model: nn.Module, seed: int = 1, **changes: Any) -> Injection:
        """Apply the method, and add noise to every floating-point parameter of its operators (see `fill`)."""
        injection = self.apply(model, **changes)
        fill(injection, seed)
        return injection

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Run the model and return the output tensor that checks compare, with its graph."""
        self.tell(model)
        return self.host.output(model(**inputs))

    def quiet(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Run the model in eval mode without gradients, and return the output tensor that checks compare. Afterwards
        the training mode is restored."""
        training = {name: module.training for name, module in model.named_modules()}
        model.eval()
        self.tell(model)
        with torch.no_grad():
            result = self.host.output(model(**inputs))
        for name, module in model.named_modules():
            module.training = training[name]
        return result


Cost = Literal["quick", "slow"]
"""The cost of a check on one case. "quick" checks take a fraction of a second. "slow" checks train or compile a model,
and take several seconds. A quick run of many methods may run slow checks for only some of them."""


@dataclass(frozen=True)
class Check:
    """One check: something that all methods promise, and the function that tests it."""

    function: Callable[[Any], str | None]
    """The function. It may return text about what it has measured."""
    promise: str
    """What the check tests, as a sentence about methods."""
    cause: str
    """The usual cause of a failure, for the message."""
    remedy: str
    """What the author of the method can do about a failure, for the message."""
    when: Callable[[Tags], bool] = lambda tags: True
    """Returns True if the check applies to methods with these tags."""
    hosts: tuple[str, ...] | None = None
    """Names of the hosts on which the check runs; None for all hosts. For example, a check of files needs only one
    host."""
    chooses: bool = False
    """True if the check chooses its hosts itself, and runs once for each method."""
    cost: Cost = "quick"
    """The cost of the check on one case."""

    @property
    def name(self) -> str:
        """The name of the function, which is used in test ids."""
        return self.function.__name__

    def __call__(self, case: Expecting) -> str | None:
        """Run on one case.

        Raises:
            CheckFailed: the check failed, or any other error was raised in it. The message is that of
                `failures.explained`.
            NotApplicable: the check cannot run on this case.
        """
        try:
            return self.function(case)
        except NotApplicable:
            raise
        except Exception as error:
            raise CheckFailed(explained(self, case, error)) from error


CHECKS: list[Check] = []
"""All checks, in the order in which they were registered."""


def check(
    promise: str,
    *,
    cause: str,
    remedy: str,
    when: Callable[[Tags], bool] = lambda tags: True,
    hosts: tuple[str, ...] | None = None,
    chooses: bool = False,
    cost: Cost = "quick",
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Decorator that registers a function as a check.

    Args:
        promise: what the check tests, as a sentence.
        cause: the usual cause of a failure, in terms of the code of a method.
        remedy: what the author of the method can do about a failure.
        when: returns True if the check applies to methods with these tags.
        hosts: names of the hosts on which the check runs; None for all hosts.
        chooses: True if the check chooses its hosts itself, and runs once for each method.
        cost: the cost of the check on one case, see `Cost`.
    """

    def file(function: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS.append(Check(function, promise, cause, remedy, when, hosts, chooses, cost))
        return function

    return file


@torch.no_grad()
def fill(injection: Injection, seed: int = 1) -> None:
    """Add normally distributed noise, with the standard deviation `FILL`, to every parameter of the injection. The
    noise depends only on the seed and on the parameter's name."""
    for path, module in injection.modules():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(f"{path}.{name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * FILL
            parameter.add_(noise.to(parameter))


def cases(
    method: type[Method],
    hosts: Mapping[str, Host],
    options: Mapping[str, Mapping[str, Any]],
    context: Context | None = None,
    tags: Tags | None = None,
) -> Iterator[tuple[Check, Case]]:
    """Yield the checks that apply to a method or preset, according to its tags. Each check is yielded once for each
    host on which it runs, with the `Case` for that host."""
    everywhere = options.get("*", {})
    anywhere, *on = [
        Case(method, host, {**everywhere, **options.get(host.name, {})}, context, tags)
        for host in (ANYWHERE, *hosts.values())
    ]
    for each in CHECKS:
        if each.when(method.tags if tags is None else tags):
            named = each.hosts
            wanted = [case for case in on if named is None or {case.host.name, case.host.like} & {*named}]
            yield from ((each, case) for case in ([anywhere] if each.chooses else wanted))
