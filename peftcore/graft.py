"""The one mechanism by which a module of the host is changed.

A grafted site keeps its identity: its class is swapped for a cached subclass of its own class with the same name, so
parameter names, `isinstance`, signature and ties stay as they were. What the subclass adds is one forward:

1. weight operators compute effective tensors, and the base forward runs on a *view*: an object of the base class that
   shares the site's `__dict__` but for those tensors. No flag is set anywhere, so nothing can be left on, raced, or
   read by the wrong reader;
2. onion operators wrap the result, the first applied innermost.

Which operators act is looked up in the host's state at each call and planned once for each active set.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from peftcore.calls import Active, HostState
from peftcore.operators import WeightOperator, _Base, is_mergeable
from peftcore.weights import GRAFTED, Layer, Ranges, bias_name, plain_class, put, take, whole

_SLOT = "_peftcore_slot"

STANCES: tuple[tuple[type[nn.Module], bool, Mapping[str, Any]], ...] = (
    # (class, always, attributes of the view): modules of torch that would go behind the back of grafts or move a frozen
    # base.
    # "always" holds while any injection is on the host; otherwise only while one acts inside the module.
    (_NormBase, True, {"training": False}),  # running statistics of a frozen base stay
    (
        nn.TransformerEncoder,
        False,
        {"use_nested_tensor": False},
    ),  # the nested-tensor path works on the fused layer path only
    (
        nn.TransformerEncoderLayer,
        False,
        {"activation_relu_or_gelu": 0},
    ),  # the fused path reads the children's weights itself
)


@dataclass(frozen=True, eq=False)
class Mount:
    """One operator at one site, as the slot of the site's module keeps it."""

    name: str
    operator: _Base
    form: str
    """"activation": around the module's forward; "weight": on one tensor."""
    tensor: str
    layer: Layer
    rows: Ranges | None = None

    def effective(self, stored: Tensor | None, like: Tensor) -> Tensor:
        """The effective tensor, in storage layout and in the dtype of `stored` (of `like` where the host has none)."""
        operate = self.operator if isinstance(self.operator, WeightOperator) else self.operator.merged
        if stored is None:
            new: Tensor = operate(None)  # type: ignore[arg-type]  # only replacements accept a missing tensor
            return new.to(like.dtype)
        logical = self.layer.logical(stored)
        part = operate(take(logical, self.rows, self.layer.batch_dims)).to(stored.dtype)
        return self.layer.stored(put(logical, part, self.rows, self.layer.batch_dims))

    def effective_bias(self, bias: Tensor | None, like: Tensor) -> Tensor | None:
        """The bias that goes with `effective`."""
        dim = self.layer.batch_dims
        part = self.operator.merged_bias(None if bias is None else take(bias, self.rows, dim))
        if bias is None or part is None:
            return part if part is None else part.to(like.dtype)
        return put(bias, part.to(bias.dtype), self.rows, dim)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The next onion layer."""
        if self.rows is None:
            return functools.partial(self.operator, call)
        return functools.partial(_around_rows, self, call)


def _around_rows(mount: Mount, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """An onion layer that sees some rows of the output: those of one part of a fused projection."""
    rows, dim = mount.rows, mount.layer.channel_dim
    whole: list[Tensor] = []

    def part(*inner_args: Any, **inner_kwargs: Any) -> Tensor:
        whole.append(call(*inner_args, **inner_kwargs))
        return take(whole[-1], rows, dim)

    changed = mount.operator(part, *args, **kwargs)
    return put(whole[-1], changed, rows, dim)


Effect = tuple[Mount, bool]
"""A mount that acts on a tensor: on the one it stands at, or (True) on the bias that goes with it."""


def effects_of(mounts: Iterable[Mount]) -> dict[str, list[Effect]]:
    """What acts on each tensor of a module, in order: an operator may act on a weight and on its bias."""
    effects: dict[str, list[Effect]] = {}
    for mount in mounts:
        effects.setdefault(mount.tensor, []).append((mount, False))
        if type(mount.operator).merged_bias is not _Base.merged_bias:
            effects.setdefault(bias_name(mount.tensor), []).append((mount, True))
    return effects


def fold(effects: Iterable[Effect], tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """The stored tensor after all effects; new ones get the dtype of `like`."""
    for mount, on_bias in effects:
        tensor = mount.effective_bias(tensor, like) if on_bias else mount.effective(tensor, like)
    return tensor


@dataclass(frozen=True, eq=False)
class Acting:
    """What one active set does at one module."""

    effects: tuple[tuple[str, tuple[Effect, ...]], ...] = ()
    """What acts on tensors, by path below the module."""
    onion: tuple[Mount, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    derives: bool = False

    def effective(self, module: nn.Module) -> dict[str, Tensor | None]:
        """The effective tensors by path below the module, computed at the operators' own precision."""
        like = next(module.parameters())
        with torch.autocast(like.device.type, enabled=False):
            return {path: fold(each, each[0][0].layer.read(module, path), like) for path, each in self.effects}


def plan_acting(mounts: list[Mount], stances: list[tuple[str | None, Mapping[str, Any]]], active: Active) -> Acting:
    """What acts, in order. A mergeable onion layer that came before a weight operator acts on the weight too, so that
    several active injections compose as merging them one after the other would."""
    acting = [mount for name in active for mount in mounts if mount.name == name]
    last = max((index for index, mount in enumerate(acting) if mount.form == "weight"), default=-1)
    weight: list[Mount] = []
    onion: list[Mount] = []
    for index, mount in enumerate(acting):
        on_weight = mount.form == "weight" or (index < last and is_mergeable(mount.operator))
        (weight if on_weight else onion).append(mount)
    attributes: dict[str, Any] = {}
    for name, stance in stances:
        if name is None or name in active:
            attributes.update(stance)
    return Acting(
        effects=tuple((path, tuple(each)) for path, each in effects_of(weight).items()),
        onion=tuple(onion),
        attributes=attributes,
        derives=any(mount.operator.derives for mount in weight),
    )


class Slot:
    """What a grafted module carries: its mounts, a witness that it ran, and what it computed for the present active
    set."""

    def __init__(self, state: HostState) -> None:
        self.state = state
        self.mounts: list[Mount] = []
        self.stances: list[tuple[str | None, Mapping[str, Any]]] = []
        self.ran = False
        self.planned: tuple[Active, Acting] | None = None
        self.plans: dict[Active, Acting] = {}
        self.kept: tuple[tuple[Any, ...], dict[str, Tensor | None]] | None = None

    def acting(self) -> Acting:
        """What the names that act in this thread and are not merged do here."""
        active = self.state.current()
        planned = self.planned  # read once: another thread may plan anew
        if planned is not None and planned[0] == active:
            return planned[1]
        return self._plan(active)  # a thread that chose for itself

    def plan(self, active: Active) -> None:
        """Plan ahead for the host's active names."""
        self.planned = active, self._plan(active)

    def _plan(self, active: Active) -> Acting:
        plan = self.plans.get(active)
        if plan is None:
            plan = self.plans[active] = plan_acting(self.mounts, self.stances, self.state.unmerged(active))
        return plan

    def changed(self) -> None:
        """Forget what was planned and computed."""
        self.planned, self.plans, self.kept = None, {}, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}, "kept": None}


def slot_of(module: nn.Module) -> Slot | None:
    """The module's slot; None when it is not grafted."""
    return module.__dict__.get(_SLOT)


def view(
    module: nn.Module, effective: Mapping[str, Tensor | None], attributes: Mapping[str, Any] | None = None
) -> nn.Module:
    """A stand-in of the plain class that shares the module's `__dict__` but for the effective tensors (paths may reach
    into children)."""
    own = {path: tensor for path, tensor in effective.items() if "." not in path}
    parametrized = module._modules.get("parametrizations")
    for name in parametrized._modules if parametrized is not None else ():  # the plain class does not compute them
        own.setdefault(name, getattr(module, name))
    stand_in: nn.Module = object.__new__(plain_class(module))
    fields = {key: value for key, value in module.__dict__.items() if key not in own and key != _SLOT}
    fields["_parameters"] = {**module._parameters, **own}
    nested: dict[str, dict[str, Tensor | None]] = {}
    for path, tensor in effective.items():
        child, dot, rest = path.partition(".")
        if dot:
            nested.setdefault(child, {})[rest] = tensor
    if nested:
        children = {child: view(module.get_submodule(child), tensors) for child, tensors in nested.items()}
        fields["_modules"] = {**module._modules, **children}
    stand_in.__dict__.update(fields, **(attributes or {}))
    return stand_in


def _on_view(module: nn.Module, acting: Acting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _run_view(module, acting, acting.effective(module), args, kwargs)


def _run_view(
    module: nn.Module,
    acting: Acting,
    tensors: Mapping[str, Tensor | None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    stand_in = view(module, tensors, acting.attributes)
    return type(stand_in).forward(stand_in, *args, **kwargs)


def _kept(slot: Slot, module: nn.Module, acting: Acting) -> dict[str, Tensor | None]:
    """Effective tensors for evaluation, kept while no tensor that they come from has changed: decoding does not rebuild
    every weight.

    The key counts in-place changes by version counters. Writes through `.data` do not count; any forward with gradients
    drops what is kept, so an optimizer that writes so is seen.
    """
    sources = [*module.parameters(), *module.buffers()]
    for _, effects in acting.effects:
        for mount, _ in effects:
            sources += [*mount.operator.parameters(), *mount.operator.buffers()]
    if any(source.is_inference() for source in sources):
        return acting.effective(module)
    inference = torch.is_inference_mode_enabled()
    key = (id(acting), inference, *((id(source), source._version, source.data_ptr()) for source in sources))
    kept = slot.kept
    if kept is None or kept[0] != key:
        kept = slot.kept = (key, acting.effective(module))
    return kept[1]


def _transformed() -> bool:
    """True inside torch.func's grad, vmap and the like, which know neither saved-tensor hooks nor addresses."""
    return bool(torch._C._are_functorch_transforms_active())


def _base_call(slot: Slot, module: nn.Module, acting: Acting, *args: Any, **kwargs: Any) -> Any:
    """The base forward on the view. In training the effective weight does not outlive its use: it is computed again in
    backward."""
    if not acting.derives or torch.compiler.is_compiling() or _transformed():
        return _on_view(module, acting, args, kwargs)
    if torch.is_grad_enabled():
        slot.kept = None
        return checkpoint(_on_view, module, acting, args, kwargs, use_reentrant=False)
    if module.training:
        return _on_view(module, acting, args, kwargs)
    return _run_view(module, acting, _kept(slot, module, acting), args, kwargs)


def _grafted_forward(base: type[nn.Module]) -> Callable[..., Any]:
    inputs = list(inspect.signature(base.forward).parameters.values())[1:2]
    first = next((each.name for each in inputs if each.kind is each.POSITIONAL_OR_KEYWORD), None)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot = slot_of(self)
        if slot is None:
            return base.forward(self, *args, **kwargs)
        slot.ran = True
        acting = slot.acting()
        if not args and first in kwargs:
            args = (kwargs.pop(first),)  # operators get what they act on by position, however the module was called
        call: Callable[..., Any] = functools.partial(base.forward, self)
        if acting.effects or acting.attributes:
            call = functools.partial(_base_call, slot, self, acting)
        for mount in acting.onion:
            call = mount.around(call)
        return call(*args, **kwargs)

    forward.__qualname__, forward.__doc__ = f"{base.__qualname__}.forward", base.forward.__doc__
    # Not functools.wraps: accelerate unwraps through __wrapped__ and would leave the graft out.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return forward


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def grafted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass that stands for `base`: one for each class, so that torch.compile and FSDP see few types."""
    if base not in _CLASSES:
        members = {
            GRAFTED: base,
            "forward": _grafted_forward(base),
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            # pickle and deepcopy find the class again through its base
            "__reduce_ex__": lambda self, protocol: (_rebuild, (base,), self.__getstate__()),
        }
        _CLASSES[base] = type(base.__name__, (base,), members)
    return _CLASSES[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = grafted_class(base)
    return cls.__new__(cls)


def attach(module: nn.Module, state: HostState) -> Slot:
    """The module's slot; swaps its class when it has none yet."""
    slot = slot_of(module)
    if slot is None:
        slot = module.__dict__[_SLOT] = Slot(state)
        state.slots.add(slot)
        module.__class__ = grafted_class(type(module))
    slot.changed()
    return slot


def detach(module: nn.Module, name: str) -> None:
    """Take out what `name` mounted; the module gets its class back with the last mount."""
    slot = slot_of(module)
    if slot is None:
        return
    slot.mounts = [mount for mount in slot.mounts if mount.name != name]
    slot.stances = [stance for stance in slot.stances if stance[0] != name]
    slot.changed()
    if not slot.mounts and not slot.stances:
        ungraft(module)


def ungraft(module: nn.Module) -> None:
    """Give the module its own class back."""
    slot = module.__dict__.pop(_SLOT, None)
    if slot is not None:
        slot.state.slots.discard(slot)
    if GRAFTED in vars(type(module)):
        module.__class__ = vars(type(module))[GRAFTED]


def stance_of(module: nn.Module) -> tuple[bool, Mapping[str, Any]] | None:
    """How the module must be held while the host is adapted, if it is one of the kinds in `STANCES`."""
    for cls, always, attributes in STANCES:
        if isinstance(module, cls):
            if always and getattr(module, "running_mean", None) is None:
                return None
            return always, attributes
    return None


def effective_weight(module: nn.Module, tensor: str, layer: Layer, rows: Ranges | None) -> Tensor:
    """The logical weight as the injections that act now leave it."""
    stored = layer.read(module, tensor)
    assert stored is not None
    stored = whole(stored)
    slot = slot_of(module)
    if slot is not None:
        active = slot.state.unmerged(slot.state.current())
        mounts = [mount for name in active for mount in slot.mounts if mount.name == name and mount.tensor == tensor]
        with torch.no_grad():
            for mount in mounts:
                stored = mount.effective(stored, stored) if is_mergeable(mount.operator) else stored
    return take(layer.logical(stored), rows, layer.batch_dims)
