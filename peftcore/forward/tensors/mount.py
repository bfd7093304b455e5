"""A mount: one operator at one site. It changes a tensor, or wraps a forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftcore.contract.operators import Held, Operator, WeightOperator, _Base, changes_bias, is_mergeable
from peftcore.errors import TrainingError
from peftcore.layers.layer import Layer, Slices, bias_name, overlap, put, take


@dataclass(eq=False, slots=True)
class Mount:
    """One operator at one site. Mounts are stored in the slot of the site's module."""

    name: str
    operator: _Base
    form: str
    """How the operator acts. "activation": around the module's forward. "weight": on one tensor. "attention": inside an
    attention module, around the function that receives queries, keys and values."""
    tensor: str
    layer: Layer
    slices: Slices | None = None

    def effective(self, stored: Tensor | None, like: Tensor, runs: bool = False) -> Tensor:
        """Returns the tensor with this operator's change, in storage layout.

        Args:
            stored: the tensor as stored; None if the host lacks it.
            like: gives the dtype if `stored` is None.
            runs: True for the tensor that a forward uses, with dropout in training. False for the tensor that a merge
                writes.
        """
        operator = self.operator
        if runs and isinstance(operator, Operator) and operator.training and operator.input_dropout:
            raise TrainingError(
                f"{self.name!r} uses dropout on the inputs of a module whose weight another adapter changes too, so "
                "the module runs with one effective weight and has no separate inputs for dropout. Train the adapters "
                "one after the other, or with dropout=0"
            )
        operate = operator if runs and isinstance(operator, WeightOperator) else operator.merged
        if stored is None:
            new: Tensor = operate(None)  # type: ignore[arg-type]  # only replacements accept a missing tensor
            return new.to(like.dtype)
        logical = self.layer.logical(stored)
        part = operate(take(logical, self.slices, self.layer.batch_dims)).to(stored.dtype)
        return self.layer.stored(put(logical, part, self.slices, self.layer.batch_dims))

    def effective_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        """Returns the bias as this operator changes it, to match the weight that `effective` returns.

        Args:
            bias: the bias; None if the host lacks it.
            weight: a function that returns the stored weight.
        """
        dim = self.layer.batch_dims

        def logical() -> Tensor:
            return take(self.layer.logical(weight()), self.slices, dim)

        part = self.operator.merged_bias(None if bias is None else take(bias, self.slices, dim), logical)
        if part is None:
            return None
        if bias is None:
            stored = weight()
            whole = self.layer.logical(stored).shape[: dim + 1]
            bias = stored.new_zeros(whole)
        return put(bias, part.to(bias.dtype), self.slices, dim)

    def around(self, call: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
        """Returns the forward `call`, wrapped in this operator."""
        if self.slices is None:
            assert isinstance(self.operator, Operator)
            return functools.partial(self.operator.at(self.form, module), call)
        return functools.partial(around_slices, self.operator, self, call)


class HeldSlices(Held):
    """The slices of a module's weight and bias at which a mount acts."""

    def __init__(self, mount: Mount, module: nn.Module) -> None:
        self._mount, self._module = mount, module

    @property
    def weight(self) -> Tensor:
        mount = self._mount
        stored = mount.layer.read(self._module, mount.tensor)
        assert stored is not None
        return take(mount.layer.logical(stored), mount.slices, mount.layer.batch_dims)

    @property
    def bias(self) -> Tensor | None:
        mount = self._mount
        stored = mount.layer.read(self._module, bias_name(mount.tensor))
        return stored if stored is None else take(stored, mount.slices, mount.layer.batch_dims)


def around_slices(
    operate: Callable[..., Any], mount: Mount, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Tensor:
    """Run an operator on some slices of the output of `call`, such as one part of a fused projection. Returns the whole
    output."""
    slices, dim = mount.slices, mount.layer.channel_dim
    whole: list[Tensor] = []

    def part(*inner_args: Any, **inner_kwargs: Any) -> Tensor:
        output: Tensor = call(*inner_args, **inner_kwargs)
        if all(inner is outer for inner, outer in zip(inner_args, args, strict=False)):
            whole.append(output)
        return take(output, slices, dim)

    changed = operate(part, *args, **kwargs)
    if not whole:  # the operator changed its input, which does not concern the other slices
        whole.append(call(*args, **kwargs))
    return put(whole[-1], changed, slices, dim)


Cast = Callable[[Any], Any]
"""A function that raises the precision of a tensor, for results that are written once (merges)."""


@dataclass(frozen=True, eq=False)
class Effect:
    """The effect of a mount on a weight, or on the bias that belongs to the weight."""

    mount: Mount
    before: tuple[Mount, ...] | None = None
    """For a bias, the mounts that act earlier on its weight; for a weight, None."""
    runs: bool = True
    """True for the tensors of a forward, False for those that a merge writes."""

    def __call__(self, module: nn.Module, tensor: Tensor | None, like: Tensor, cast: Cast) -> Tensor | None:
        """Returns the stored tensor after this effect."""
        if self.before is None:
            return self.mount.effective(tensor, like, self.runs)

        def weight() -> Tensor:
            stored: Tensor = cast(self.mount.layer.read(module, self.mount.tensor))
            for mount in self.before or ():
                stored = mount.effective(stored, like, self.runs)
            return stored

        return self.mount.effective_bias(tensor, weight)


def effects_of(mounts: Iterable[Mount], runs: bool = True) -> dict[str, list[Effect]]:
    """Returns the effects on each tensor of a module, in order. One operator may change a weight and its bias."""
    effects: dict[str, list[Effect]] = {}
    for mount in mounts:
        earlier = effects.setdefault(mount.tensor, [])
        if changes_bias(mount.operator):
            before = tuple(each.mount for each in earlier)
            effects.setdefault(bias_name(mount.tensor), []).append(Effect(mount, before, runs))
        earlier.append(Effect(mount, None, runs))
    return effects


def overridden(mounts: Mapping[str, Sequence[Mount]], active: Iterable[str]) -> Iterator[tuple[Mount, Mount]]:
    """Yields pairs of mounts. The effect of the first on a tensor is lost, because the second belongs to a later
    injection and replaces the value."""
    earlier: dict[str, list[Mount]] = {}
    for name in active:
        own = mounts.get(name, ())
        for mount in own:
            if mount.operator.overrides:
                yield from (
                    (each, mount) for each in earlier.get(mount.tensor, ()) if overlap(each.slices, mount.slices)
                )
        for mount in own:  # of what scales a bias along with its weight, the weight's part stays
            if is_mergeable(mount.operator):
                earlier.setdefault(mount.tensor, []).append(mount)


def _as_it_is(tensor: Any) -> Any:
    return tensor


def fold(
    module: nn.Module, effects: Iterable[Effect], tensor: Tensor | None, like: Tensor, cast: Cast = _as_it_is
) -> Tensor | None:
    """Returns the stored tensor after all effects. If the host lacks the tensor, the result has the dtype of `like`.
    `cast` is applied to other tensors that are read from the module."""
    for effect in effects:
        tensor = effect(module, tensor, like, cast)
    return tensor
