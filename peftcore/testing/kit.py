"""The base of the conformance kit: `Host`, `Case`, `Check`, and the list of all checks.

A check is one function, named as the sentence that it proves. It gets a `Case` (one method on one tiny host) and raises
`CheckFailed`, whose message (see `failures`) names the method, the host, the promise, the usual cause and what to do.
Checks are chosen by a method's tags, never by its name. The tolerances of all checks are defined here, by dtype.
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
"""Largest accepted difference relative to the largest output, by dtype."""
ALL = "PEFTCORE_TEST_ALL"
"""Environment variable: if it is 1, every method runs on every host."""
FILL = 0.1
"""The standard deviation of the noise that is added to operator tensors, since a fresh LoRA-like adapter does not
change the base's outputs."""


class NotApplicable(Exception):
    """Raised if the method has no sites in this host, or the host's package is missing; the message is the reason."""


Build = Callable[[], tuple[nn.Module, dict[str, Any]]]
"""Builds a host and its inputs."""


@dataclass(frozen=True)
class Host:
    """A tiny host.

    Attributes:
        name: its name in test ids.
        build: builds the seeded model in eval mode, and its inputs as keyword arguments.
        output: returns the tensor to compare from the model's result.
        fallback: the target for methods whose default roles the host lacks.
        shallow: builds the host with one layer if it has several, for checks whose time grows with the number of
            layers, such as compiling.
        in_double: changes the model so that it can compute in float64; None if no change is needed.
        like: the name of another host: checks for that host run on this one too.
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
"""Stands for the hosts of checks that choose hosts by themselves; options for them are passed under its name,
"task"."""


@functools.lru_cache(maxsize=64)
def _prototype(build: Build) -> Copies[tuple[nn.Module, dict[str, Any]]]:
    """Build a host, always the same. Each check gets a copy, which takes a tenth of the time."""
    with preserved_rng():
        torch.default_generator.manual_seed(0)
        return Copies(build())


Context = Callable[[nn.Module, Tensor], Mapping[str, Any]]
"""Returns the arguments of ``peftcore.call(model, ...)`` from a host and pictures [rows or 1, 1, 16, 16]."""


class Expecting:
    """The assertions that all checks use; base class of cases."""

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
            CheckFailed: with the message `what`, to which `Check` adds the explanation.
        """
        if not holds:
            raise CheckFailed(what)

    def expect_close(self, actual: Tensor, expected: Tensor, what: str, factor: float = 1.0) -> None:
        """Fail unless the tensors agree within the tolerance of their dtype, times `factor` for sums of many rounding
        errors."""
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
        """Fail unless the output changed by at least 100 times the tolerance: otherwise a comparison would prove
        nothing."""
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
    """Makes the arguments of every call, for methods that need them."""
    claimed: Tags | None = None
    """The tags of the preset whose options this case has; None if the case has no preset."""

    @property
    def label(self) -> str:
        return f"{self.method.name} on {self.host.name}"

    @property
    def subject(self) -> type:
        return self.method

    @property
    def tags(self) -> Tags:
        """The tags of the method, or of its preset."""
        return self.method.tags if self.claimed is None else self.claimed

    @cached_property
    def looks_at_data(self) -> bool:
        """True if the method needs data in `apply`, with the options of this case."""
        return self.method.asks_for_data(self.options)

    def fresh(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
        """Build a new host, always an equal one, and its inputs; floating-point inputs have `dtype`."""
        return self._built(self.host.build, dtype)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The method's own options, without the arguments `target` and `train` of `apply`."""
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
        """Build the host with one layer and its inputs, if that is enough for the method."""
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
        """Apply the method with its default targets, or with the host's `fallback` if the host lacks these roles, and
        set the context that the method needs."""
        injection = self.apply_alone(model, **changes)
        self.tell(model)
        return injection

    def apply_alone(self, model: nn.Module, **changes: Any) -> Injection:
        """Apply as `apply` does, but set no context."""
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
        """Set the context that the method needs for all further calls of the model: one picture for all rows."""
        if self.context is not None:
            picture = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(3))
            there = next(model.parameters()).device
            peftcore.call(model, **self.context(model, picture.to(there)))

    def batches(self, run: Callable[[nn.Module], Tensor], inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the argument ``data`` for methods that need data: two batches, whose losses are computed from one half
        each of the outputs of `run`. Each batch has labels of two classes for the rows of `inputs`."""
        rows = next((len(each) for each in (inputs or {}).values() if isinstance(each, Tensor) and each.dim()), 0)

        def batch(half: int) -> Labelled:
            labels = (torch.arange(rows) + half) % 2
            return Labelled(lambda model: run(model).flatten()[half::2].square().mean(), labels)

        return {"data": [batch(0), batch(1)]} if self.looks_at_data else {}

    def filled(self, model: nn.Module, seed: int = 1, **changes: Any) -> Injection:
        """Apply, and add noise from N(0, FILL) to every operator tensor."""
        injection = self.apply(model, **changes)
        fill(injection, seed)
        return injection

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the host's output tensor, with gradients."""
        self.tell(model)
        return self.host.output(model(**inputs))

    def quiet(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the host's output tensor, computed in eval mode without gradients; the training mode is restored."""
        training = {name: module.training for name, module in model.named_modules()}
        model.eval()
        self.tell(model)
        with torch.no_grad():
            result = self.host.output(model(**inputs))
        for name, module in model.named_modules():
            module.training = training[name]
        return result


Cost = Literal["quick", "slow"]
"""The cost of a check on one case: "quick" checks take a fraction of a second, "slow" ones several seconds (they train
or compile a model). Quick runs of a suite of many methods may run slow checks for only some methods."""


@dataclass(frozen=True)
class Check:
    """A promise of methods, and the function that checks it."""

    function: Callable[[Any], str | None]
    """The function; it may return text about its measurements."""
    promise: str
    """The promise, as a sentence."""
    cause: str
    """The usual cause of a failure, for the message."""
    remedy: str
    """What the author of the method can do about it, for the message."""
    when: Callable[[Tags], bool] = lambda tags: True
    """Returns True if the check applies to methods with these tags."""
    hosts: tuple[str, ...] | None = None
    """Names of the hosts on which the check runs; None for all hosts. A check of files, for example, needs only one
    host."""
    chooses: bool = False
    """True if the check chooses hosts by itself, and runs once for each method."""
    cost: Cost = "quick"
    """The cost of a case."""

    @property
    def name(self) -> str:
        """The name of the function, which is used in test ids."""
        return self.function.__name__

    def __call__(self, case: Expecting) -> str | None:
        """Run on one case.

        Raises:
            CheckFailed: with a message as of `explained`; also when the method raises something else.
            NotApplicable: the method has nothing to act on in the host.
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
    """Register a function as a check.

    Args:
        promise: the promise that it checks, as a sentence.
        cause: the usual cause of a failure, in terms of the code of a method.
        remedy: what the author of the method can do about it.
        when: returns True if the check applies to methods with these tags.
        hosts: names of the hosts on which it runs; None for all hosts.
        chooses: True if it chooses hosts by itself, and runs once for each method.
        cost: the cost of the check on one case, see `Cost`.
    """

    def file(function: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS.append(Check(function, promise, cause, remedy, when, hosts, chooses, cost))
        return function

    return file


@torch.no_grad()
def fill(injection: Injection, seed: int = 1) -> None:
    """Add noise from N(0, FILL) to every floating-point parameter of the injection, the same noise for the same seed
    and name."""
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
    """Yield each check that applies by the tags of the method or its preset, with a case for each host on which the
    check runs."""
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
