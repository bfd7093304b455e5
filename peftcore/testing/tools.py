"""Helpers for checks. They record the state of a host, expect errors, register methods by name, count operations, and
make pairs of adapters for one host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry

import peftcore
from peftcore.contract.config import MethodConfig
from peftcore.contract.method import Method, Tags
from peftcore.contract.operators import Operator, WeightOperator
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import AmbiguousMethod, UnknownMethod
from peftcore.injection.injection import Injection
from peftcore.registry import catalogue
from peftcore.registry.plugins import layer_of
from peftcore.targets.sites import Site
from peftcore.testing.kit import Case, Expecting, fill

Trace = dict[str, Any]
Maker = Callable[[nn.Module, int, str], Injection]


class Itself:
    """Wraps a tensor so that two wrappers are equal only if they wrap the same tensor object. It stores a reference to
    the tensor, because a new tensor may get the id of a deleted one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.tensor is other.tensor

    __hash__ = None  # type: ignore[assignment]


def trace(model: nn.Module) -> Trace:
    """Return the observable state of a host: classes, attributes, hooks, flags and values, by kind and by path of the
    module."""
    found: Trace = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"class of {path}"] = type(module)
        own = {  # tables of hooks may be made when somebody asks for them
            name: value for name, value in vars(module).items() if not isinstance(value, OrderedDict) or value
        }
        found[f"attributes of {path}"] = sorted(own)
        found[f"training of {path}"] = module.training
        hooks = {key: value for key, value in own.items() if isinstance(value, OrderedDict)}
        found[f"hooks of {path}"] = {key: [id(hook) for hook in value.values()] for key, value in hooks.items()}
        tensors = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            if tensor is not None:
                found[f"identity of {path}.{name}"] = Itself(tensor)
                found[f"requires_grad of {path}.{name}"] = tensor.requires_grad
                for part, values in _held(tensor.detach()):
                    found[f"values of {path}.{name}{part}"] = values.clone()
    found["order of parameters"] = [name for name, _ in model.named_parameters()]
    return found


@contextmanager
def shapes_only() -> Iterator[None]:
    """Context manager in which tensors have a shape, a dtype and a device, but no values (torch's fake tensors). Hosts
    whose code depends on the values of a mask use their general code, as in tracing. The encoder of torch does not use
    its fused path."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _held(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors that a tensor consists of, with names. For a quantized tensor, these are its codes and
    scales. Tensors with one byte per value are viewed as uint8."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            if getattr(tensor, name) is not None:
                yield from ((f".{name}{part}", values) for part, values in _held(getattr(tensor, name)))
    else:
        yield "", tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def differences(before: Trace, after: Trace, passing: str | tuple[str, ...] = ()) -> str:
    """Compare two results of `trace` bit by bit. Return the names of the entries that differ, as text; empty if there
    are none. Entries whose names start with `passing` are not compared."""
    keys = [key for key in dict.fromkeys([*before, *after]) if not key.startswith(passing)]
    wrong = [key for key in keys if not _same(before.get(key), after.get(key))]
    return ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    return type(one) is type(other) and bool(one == other)


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Context manager in which torch's encoder does not use its fused path, which has other rounding errors. Otherwise
    torch uses that path if there are no gradients and no hooks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Counts(TorchDispatchMode):
    """Context manager that counts the operations of torch, in forward and backward.

    Attributes:
        operations: the number of operations.
        flops: the number of floating-point operations in matrix products and convolutions, as torch counts them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.flops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.operations += 1
        self.flops += 0 if count is None else count(*args, **(kwargs or {}), out_val=result)
        if func is torch.ops.aten.convolution_backward.default:
            self.flops -= _too_many(*args, result=result)
        return result


def _too_many(*args: Any, result: Any) -> int:
    """Returns the number of operations that torch's counter counts too much for the weight's gradient of a grouped
    convolution. The counter multiplies each output channel with all input channels, not only with those of its
    group."""
    *given, groups, (_, weight, _) = args
    if groups == 1 or not weight:
        return 0
    counter = flop_registry[torch.ops.aten.convolution_backward]
    counted: int = counter(*given, groups, [False, True, False], out_val=result)
    return counted - counted // int(groups)


@contextmanager
def raises(
    case: Expecting, kind: type[Exception] | tuple[type[Exception], ...], what: str, names: str | Iterable[str] = ()
) -> Iterator[None]:
    """Context manager that fails the check unless its block raises an error of class `kind` whose message contains all
    of `names`."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(each.__name__ for each in kinds)
    try:
        yield
    except kinds as error:
        missing = [name for name in ([names] if isinstance(names, str) else names) if name not in str(error)]
        case.expect(not missing, f"{what}: {error!r} does not name {missing}")
    except Exception as error:
        case.expect(False, f"{what}: {error!r} instead of {expected}")
    else:
        case.expect(False, f"{what}: no {expected}")


@contextmanager
def findable(method: type[Method]) -> Iterator[None]:
    """Context manager in which a method class is registered if no plugin has it, so that files with the method's name
    can be loaded."""
    try:
        missing = peftcore.method(method.name) is not method
    except AmbiguousMethod:
        missing = False
    except UnknownMethod:
        missing = True
    before = catalogue._registered.get(method.name)
    if missing:
        peftcore.register(method)
    try:
        yield
    finally:
        if before is not None:
            catalogue._registered[method.name] = before
        elif missing:
            catalogue._registered.pop(method.name, None)


class _LowRankConfig(MethodConfig):
    method: Literal["partner_low_rank"] = "partner_low_rank"


class _LowRankOperator(Operator):
    """Adds a low-rank update to the module's output."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site)
        self.A = nn.Parameter(torch.randn(2, site.in_features, *site.kernel) * 0.1)
        self.B = nn.Parameter(torch.zeros(site.out_features, 2))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(x, A), B, 1.0)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A.flatten(1)).view(weight.shape)


class _TurnedConfig(MethodConfig):
    method: Literal["partner_turned"] = "partner_turned"


class _TurnedOperator(WeightOperator):
    """Mixes the rows of the weight and changes their lengths. This is an example of a change that is not a sum of the
    weight and an update."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site)
        self.lengths = nn.Parameter(torch.ones(site.out_features))
        self.turn = nn.Parameter(torch.zeros(site.out_features, site.out_features))

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1).to(self.turn.dtype)
        mixed = flat + self.turn @ flat
        lengths = torch.linalg.vector_norm(mixed, dim=1, keepdim=True).clamp_min(1e-6)
        turned: Tensor = mixed / lengths * (self.lengths[:, None] + 0.5)
        return turned.view(weight.shape)


class _LowRank(Method):
    name = "partner_low_rank"
    Config = _LowRankConfig
    tags = Tags(category="reparameterized", paper="2106.09685", mergeable=True)
    target = "all-linear"

    def inject(self, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, _LowRankOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Any) -> int:
        return sum(p.numel() for p in _LowRankOperator(site, config).parameters())


class _Turned(Method):
    name = "partner_turned"
    Config = _TurnedConfig
    tags = Tags(category="reparameterized", paper="none", mergeable=True)
    target = "all-linear"

    def inject(self, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, _TurnedOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Any) -> int:
        return site.out_features * (site.out_features + 1)


class _GainOperator(Operator):
    """Scales the module's output, including its bias."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.ones(site.out_features))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        (gain,) = self.cast(y, self.gain)
        return y * self.layer.along_channels(gain, y)

    def merged(self, weight: Tensor) -> Tensor:
        return weight * self.gain.view(-1, *[1] * (weight.dim() - 1))

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        return None if bias is None else bias * self.gain


KINDS = ("activation", "weight", "gain", "bias")
"""Kinds of operators: a low-rank update in parallel with a module ("activation"), an operator on its weight, a factor
for its output ("gain"), and a replacement of its bias."""


class _KindsConfig(MethodConfig):
    method: Literal["partner_kinds"] = "partner_kinds"
    kind: Literal["activation", "weight", "gain", "bias"]


class Kinds(Method):
    """A method whose operators are of one kind, one of `KINDS`."""

    name = "partner_kinds"
    Config = _KindsConfig
    tags = Tags(category="reparameterized", paper="2106.09685", mergeable=True)
    target = "all-linear"

    def inject(self, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
        operators = {"activation": _LowRankOperator, "weight": _TurnedOperator, "gain": _GainOperator}
        for site in surgeon.sites():
            if config.kind == "bias":
                surgeon.replace(site.at("bias"))
            else:
                surgeon.graft(site, operators[config.kind], config)

    @staticmethod
    def parameter_count(site: Site, config: Any) -> int:
        return site.numel


def overriding(injection: Injection) -> bool:
    """True if an operator of an injection ignores the tensor at its site and replaces it. Two such injections cannot be
    active together."""
    return any(graft.operator.overrides for graft in injection.grafts)


def partners(case: Case) -> Iterator[tuple[Maker, Maker]]:
    """Yield pairs of functions, each of which adapts a model with one adapter. The pairs are: the method twice; the
    method, then an operator on activations or on weights; and the same in reverse order."""

    def own(model: nn.Module, seed: int, name: str) -> Injection:
        return case.filled(model, seed, name=name)

    def other(method: type[Method]) -> Maker:
        def make(model: nn.Module, seed: int, name: str) -> Injection:
            injection = peftcore.apply(model, method, name=name, target=_callable_alone(model), seed=seed)
            fill(injection, seed)
            return injection

        return make

    yield own, own
    for method in (_LowRank, _Turned):
        yield own, other(method)
        yield other(method), own


def _callable_alone(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """Return a target that matches the linear layers which the host calls as modules and whose weight is not tied."""
    held: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            held[id(parameter)] = held.get(id(parameter), 0) + 1

    def chosen(path: str, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() < 2 or held[id(weight)] > 1:
            return False
        layer = layer_of(module, "weight")
        return layer.called and not layer.one_hot and not _read_by_owner(model, path)

    return chosen


def _read_by_owner(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Context manager that sets torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
