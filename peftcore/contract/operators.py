"""The trainable modules that methods put at sites: they are called, they own their parameters, they never hold the
host.

* `Operator`: an onion layer around a module's forward; ``forward(call, *inputs)``, where `call` is the next inner
layer.
* `WeightOperator`: a reparameterization of one tensor; ``forward(weight) -> weight`` in logical layout.
* `Replacement`: the weight operator of selective methods: a value that stands for the tensor while it is active.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peftcore.errors import NotMergeable

if TYPE_CHECKING:
    from peftcore.targets.sites import Site

Factors = tuple[Tensor, Tensor, float]
"""``(A, B, scale)`` of a low-rank update ``scale * B A``; A is ``[*batch, rank, in, *kernel]`` and B is ``[*batch, out,
rank]``."""


class Checked(nn.Module):
    """A module whose values can be wrong though their shapes and dtypes are right, such as places in a weight. What a
    file holds is checked before the host changes."""

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        """What is wrong with values from a file for this module's own tensors, in words that follow the tensor's name.

        Args:
            values: tensors of the right shapes by their names in this module; some may be missing.

        Yields:
            ``"index holds places beyond the weight"``.
        """
        yield from ()


class _Base(Checked):
    """What both kinds share: the layer at which the operator acts (plain data, never the host's module)."""

    needs_recompute = True
    """True when the effective tensor is computed and must not outlive its use; False when a parameter stands for it as
    it is."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.layer = site.layer

    def merged(self, weight: Tensor) -> Tensor:
        """The effective weight for the base weight `weight` (logical layout): the same mathematics as forward.

        Raises:
            NotMergeable: unless the operator overrides it.
        """
        raise NotMergeable(f"{type(self).__name__} does not say what its merged weight is")

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        """The effective bias that goes with `merged`; most methods leave it alone. `weight` gives the weight that
        `merged` gets, for the few whose bias depends on it."""
        return bias

    def base_to_pack(self, weight: Tensor) -> Tensor:
        """What `quantize` packs in place of the base weight ``[out, in]``, for methods that are made for a packed base;
        most leave it alone."""
        return weight

    def base_was_packed(self) -> None:
        """What `base_to_pack` said is packed now, and is the base from here on."""

    def tables(self) -> Iterator[Mapping[str, Tensor | None]]:
        """Where all stands that it computes with: its parameters and buffers, and those of shared modules that it
        holds."""
        for module in self.modules():
            yield from tables(module)
            for held in vars(module).values():
                if isinstance(held, Shared):
                    yield from (table for each in held.module.modules() for table in tables(each))

    def cast(self, like: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`tensors` in the dtype of `like`: also under autocast, which would promote elementwise products."""
        dtype = like.dtype
        for tensor in tensors:
            if tensor.dtype is not dtype:
                return tuple([each.to(dtype) for each in tensors])
        return tensors  # as nearly always, and at every token

    def factors(self) -> Factors | None:
        """The low-rank factors, where the update is one: what export, routing and adapter algebra need to know."""
        return None


class Operator(_Base):
    """An onion layer. `forward` receives the inner call and the site's own inputs, and returns what the site would
    return.

    Where the site cannot be called (a raw parameter, an attention's packed projection, a grouped convolution), the core
    uses `merged` in its place, so a method that defines both works on every kind of module.
    """

    dropout: float = 0.0
    """Probability with which inputs of a low-rank update are dropped in training."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Act around `call`, which takes the site's own inputs and gives its output: a tensor ``[..., out]`` of a
        linear layer, ``[batch, out, *positions]`` of a convolution, a tuple of some attentions (see `on_first`). What
        comes back has the same shapes and dtypes.

        Raises:
            MissingContext, SequenceError, ConfigError: the operator needs what this call does not bring, or cannot act
                on what it brings.
        """
        raise NotImplementedError

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        """What acts around a module: the operator itself. One that stands at several modules tells them apart by the
        form of the site (and reads what it needs of the module, but never keeps it)."""
        return self


def low_rank(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates the forward of an operator that is a low-rank update and nothing else: ``call(x) + scale * B A
    dropout(x)`` of what its `factors` gives, with the probability `Operator.dropout` in training.

    Then the core computes it by a fused kernel on layers that have one (`Layer.fuses_updates`), and the forward itself
    runs on all others. The conformance kit holds one equal to the other, with gradients.
    """

    @functools.wraps(forward)
    def update(self: Operator, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not self.layer.fuses_updates:
            return forward(self, call, x)
        factors = self.factors()
        assert factors is not None, "low_rank is for operators that have factors"
        return self.layer.update(call, x, *factors, self.dropout if self.training else 0.0)

    vars(update)["plain"] = forward
    return update


class Combiner(Operator):
    """Makes one output of those of several injections, in the composition `Fuse`; by itself it acts on nothing."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return call(*args, **kwargs)

    def combine(self, outputs: list[Tensor], base: Tensor) -> Tensor:
        """One output, from that of each part and what the module returns without them, all [..., features].

        Raises:
            CompositionError: the outputs have not the features that it was made for.
        """
        raise NotImplementedError


class Held(ABC):
    """What an operator may read of the module at which it acts: weight and bias, in logical layout."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """``[out, in, *kernel]``."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """``[out]``; None where the module has none."""


class WeightOperator(_Base):
    """A reparameterization: maps one tensor, in logical layout, to the effective one. Works on every kind of module."""

    def forward(self, weight: Tensor) -> Tensor:
        """The effective tensor for `weight` ``[*batch, out, in, *kernel]``, of the same shape; returned in any dtype,
        cast once by the core. Of what has no two dimensions, such as a bias, `weight` is ``[out]``."""
        raise NotImplementedError

    def prefers_activation_form(self, x: Tensor) -> bool:
        """Whether `activation_form` is the cheaper way for an input ``[..., in]``."""
        return False

    def prepare(self, held: Held) -> Any:
        """What `activation_form` needs that no input changes, such as a rotation: small things, made of parameters and
        of what the module holds, at their own precision. In evaluation they are kept while none of these changes."""
        return None

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: Any) -> Tensor:
        """The same mathematics by what goes into the module and comes out: `call` is ``W x + b``, `x` ``[..., in]``,
        `prepared` what `prepare` made.

        Used in training and where gradients are wanted, for rows of a batch that have adapters of their own, and beside
        packed weights, if the module is a linear map that is called (`layer.called`) and nothing else acts on its
        weight: no effective weight is made then, nor a gradient of its size.
        """
        raise NotImplementedError

    def merged(self, weight: Tensor) -> Tensor:
        """Merging applies forward once."""
        merged: Tensor = self(weight)
        return merged


class Replacement(WeightOperator):
    """A value that stands for a tensor while active: training in place by construction, with the base untouched.

    Starts from the tensor itself, or from zeros where the host has none (a missing bias).
    """

    needs_recompute = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.value = nn.Parameter(site.weight().detach().clone())

    def forward(self, weight: Tensor | None) -> Tensor:
        return self.value if weight is None else self.value.to(weight.dtype)


def tables(module: nn.Module) -> tuple[Mapping[str, Tensor | None], Mapping[str, Tensor | None]]:
    """A module's own parameters and buffers, as it keeps them."""
    return module._parameters, module._buffers


class Shared:
    """State that several operators use: registered and saved once by the surgeon, so an operator holds it without
    owning it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def on_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to a module's output, or to its first entry where it is a tuple (attention: output, weights)."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


def is_mergeable(operator: _Base) -> bool:
    """True when the operator says what its effective weight is."""
    return isinstance(operator, WeightOperator) or type(operator).merged is not _Base.merged


def changes_bias(operator: _Base) -> bool:
    """True when the operator changes the bias that goes with its weight."""
    return type(operator).merged_bias is not _Base.merged_bias


def trainable_numbers(operators: Iterable[nn.Module]) -> int:
    """The number of distinct trainable values."""
    seen = {id(p): p.numel() for operator in operators for p in operator.parameters() if p.requires_grad}
    return sum(seen.values())
