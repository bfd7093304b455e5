"""The trainable modules that methods put at sites. Operators own their parameters and never hold a reference to the
host.

* `Operator`: a wrapper around a module's forward; ``forward(call, *inputs)``, where `call` is the next inner wrapper or
  the module itself.
* `WeightOperator`: a reparameterization of one tensor; ``forward(weight) -> weight`` in logical layout.
* `Replacement`: the weight operator of selective methods: a value that replaces the tensor while it is active.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from peftcore.errors import NotMergeable, NoWeights, TrainingError
from peftcore.targets.sites import Site

PROBABILITIES = ("dropout", "input_dropout")
"""Attributes that hold the probability with which something is dropped."""
Factors = tuple[Tensor, Tensor, float]
"""``(A, B, scale)`` of a low-rank update ``scale * B A``; A is ``[*batch, rank, in, *kernel]`` and B is ``[*batch, out,
rank]``."""


class Checked(nn.Module):
    """A module that checks values from a file before the model changes: values such as indices into a weight can be
    wrong although their shapes and dtypes are right."""

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        """Yields the errors in values from a file for this module's own tensors, in words that follow the tensor's
        name.

        Args:
            values: tensors of the right shapes by their names in this module; some may be missing.

        Yields:
            ``"index holds places beyond the weight"``.
        """
        yield from ()


class _Base(Checked):
    """Base class of all operators: holds the layer at which the operator acts (plain data, never the host's module)."""

    needs_recompute = True
    """True if the effective tensor is computed, so backward recomputes it instead of saving it; False if a parameter is
    used as the effective tensor."""
    observes: frozenset[str] = frozenset()
    """Forms of sites at which the operator only observes: it reads the module's original inputs and final output, after
    all other operators, and changes neither; in routes and compositions too."""
    factors_are_parameters = False
    """True if `factors` returns parameters. In training, the updates of many adapters are then one product; gradients
    of computed factors would need further products."""
    changes_inputs = False
    """True if the operator, or its activation form, calls the wrapped module with changed inputs. In a route the module
    then runs once for the rows of each injection instead of once for all rows."""
    only_inputs = False
    """True if the operator only changes the input of the module that it wraps, and returns the module's output as it
    is. A composition can then mix the inputs of its branches (`Combiner`)."""
    stackable = False
    """True if `torch.vmap` can run the forward, which depends on its inputs and its own tensors alone. In a route,
    equal operators of several adapters are then computed as one operator with stacked tensors."""
    padded: ClassVar[frozenset[str]] = frozenset()
    """Names of the tensors, such as ``"A"`` or ``"down.weight"``, that may be padded with zeros to a larger rank: the
    operator then computes the same. An adapter of a smaller rank can be swapped in."""
    scaled: ClassVar[frozenset[str]] = frozenset()
    """Names of tensors, one of each product, by which `scale` is multiplied, if `scale` has no other effect. An adapter
    with another scale can then be swapped in: the ratio of scales is multiplied into these tensors."""
    training_only: ClassVar[frozenset[str]] = frozenset({"input_dropout", "dropout"})
    """Names of attributes that have no effect in evaluation. A swap leaves them as they are."""
    known_by: ClassVar[frozenset[str]] = frozenset()
    """Names of attributes that identify the operator, such as keys of caches: they differ between any two operators."""
    trains_only = False
    """True if the operator acts only in training; merging skips it."""
    overrides = False
    """True if the operator ignores its input tensor, so earlier adapters on that tensor have no effect."""
    reads_from_base: frozenset[str] = frozenset()
    """Paths of tensors of the model, other than those of its site, that the operator computes with as they are stored.
    No other adapter may be merged into them as long as the operator is installed."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.layer = site.layer

    def get_tensor(self, name: str) -> Tensor:
        """Returns a parameter or buffer by its name. Within torch.func it is a plain tensor, which `get_parameter`
        refuses."""
        found: Tensor = getattr(self, name)
        return found

    def register_forward_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """Add a hook, like `register_forward_hook` of any module.

        Raises:
            TrainingError: the hook is one of Opacus, which expects that all inputs of a module are tensors.
        """
        if (getattr(hook, "__module__", None) or "").partition(".")[0] == "opacus":
            raise TrainingError(
                "Opacus computes gradients of single examples only for modules whose inputs are all tensors, but "
                "operators also get the forward that they wrap: pass peftcore.training.PerExample(model) to Opacus, "
                "with grad_sample_mode='no_op'"
            )
        return super().register_forward_hook(hook, **options)

    def merged(self, weight: Tensor) -> Tensor:
        """Returns the effective weight for the base weight `weight` (logical layout): the same mathematics as forward.

        Raises:
            NotMergeable: the operator does not override `merged`.
        """
        raise NotMergeable(
            f"{type(self).__name__} has no merged weight, because it does not define `merged`; keep the adapter "
            "unmerged"
        )

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        """Returns the effective bias that goes with `merged`; most methods leave it alone. `weight` returns the weight
        that `merged` gets, for the few methods whose bias depends on it."""
        return bias

    def base_to_pack(self, weight: Tensor) -> Tensor:
        """Returns the weight that `quantize` packs in place of the base weight ``[out, in]``, for methods that are made
        for a quantized base; by default the base weight."""
        return weight

    def base_was_packed(self) -> None:
        """Called after the result of `base_to_pack` was packed and has replaced the base weight."""

    def tables(self) -> Iterator[Mapping[str, Tensor | None]]:
        """Yields the dictionaries of all parameters and buffers of the operator and of the shared modules that it
        uses."""
        for module in self.modules():
            yield from tables(module)
            for held in vars(module).values():
                if isinstance(held, Shared):
                    yield from (table for each in held.module.modules() for table in tables(each))

    def cast(self, like: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns `tensors` in the dtype of `like`: also under autocast, which would promote elementwise products."""
        dtype = like.dtype
        for tensor in tensors:
            if tensor.dtype is not dtype:
                return tuple([each.to(dtype) for each in tensors])
        return tensors  # as nearly always, and at every token

    def check_here(self, values: Tensor, like: Tensor) -> None:
        """Check that `values`, a tensor of the operator, is not offloaded while the operator computes on the device of
        `like`.

        Raises:
            NoWeights: the tensor is offloaded. Offloading restores tensors only when their module is called.
        """
        if values.is_meta and not like.is_meta:
            raise NoWeights(
                f"{type(self).__name__} reads values that are offloaded, and no module is called here that would "
                "restore them: offload the model first, and apply the method then"
            )

    def drop_nothing(self) -> bool:
        """Turn the operator's dropout off, for trainers that turn off the dropout of the whole model. Override it if
        the operator's probabilities are neither dropout modules of torch nor attributes called ``dropout`` or
        ``input_dropout``.

        Returns:
            Whether the operator had dropout.
        """
        return turn_off_dropout(self)

    def factors(self) -> Factors | None:
        """Returns the low-rank factors of a low-rank update, for export, routing and adapter algebra; None for other
        updates."""
        return None


class Operator(_Base):
    """An operator that wraps the forward of a module: its `forward` gets the inner call and the module's inputs, and
    returns the output.

    At a tensor whose module cannot be called alone (a bare parameter, a fused projection of attention, a grouped
    convolution), the core uses `merged` instead. So a method that defines both works on every kind of module.
    """

    input_dropout: float = 0.0
    """Probability with which inputs of a low-rank update are dropped in training."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the module with the operator's change, in the shapes and dtypes of `call`.

        Args:
            call: runs the wrapped module on given inputs. It returns a tensor ``[..., out]`` (linear layers), a tensor
                ``[batch, out, *positions]`` (convolutions) or a tuple (some attentions, see `on_first`).
            args: the module's inputs by position.
            kwargs: its inputs by name.

        Raises:
            MissingContext, SequenceError, ConfigError: this call lacks arguments that the operator needs, or has
                arguments that the operator does not support.
        """
        raise NotImplementedError

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        """Returns the callable that wraps a module: by default the operator itself. An operator of several modules may
        return another one for each form of site. It may read the module here, and must not keep it."""
        return self


Mine = Callable[[Tensor], Tensor | None]
"""Type of functions that return, for a tensor ``[batch, ...]``, a mask ``[batch]`` of bool of an adapter's rows; None
if all rows are the adapter's."""


class InputOperator(Operator):
    """An operator that only changes the arguments of a module, separately for each row.

    In a route the module runs once for all rows, each row with the arguments that its adapter has changed.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._names = site.arguments

    def arguments(self, given: dict[str, Any], mine: Mine) -> dict[str, Any]:
        """Returns the module's arguments by name: `given`, with changes only in the rows of the adapter.

        Raises:
            MissingContext, SequenceError, ConfigError: as `Operator.forward`.
        """
        raise NotImplementedError

    def change(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], mine: Mine
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the changed arguments of a call: arguments that were passed by position stay positional, as the
        operators that wrap the module expect; the others are passed by name."""
        names = self._names[: len(args)]
        changed = self.arguments({**dict(zip(names, args, strict=False)), **kwargs}, mine)
        first = []
        for name in names:
            if name not in changed:
                break
            first.append(changed.pop(name))
        return (*first, *args[len(self._names) :]), changed

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module on the changed arguments of all rows."""
        args, kwargs = self.change(args, kwargs, _all)
        return call(*args, **kwargs)


def _all(like: Tensor) -> None:
    """All rows are an adapter's."""


def low_rank(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate the forward of an operator that is only a low-rank update: ``call(x) + scale * B A dropout(x)`` with the
    factors of its `factors`, and with the probability `Operator.input_dropout` in training.

    The core then computes the update by a fused kernel on layers that have one (`Layer.fuses_updates`), and runs the
    forward on all other layers. The conformance kit tests that both have equal outputs and gradients.
    """

    @functools.wraps(forward)
    def update(self: Operator, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not self.layer.fuses_updates:
            return forward(self, call, x)
        factors = self.factors()
        assert factors is not None, "low_rank is for operators that have factors"
        return self.layer.update(call, x, *factors, self.input_dropout if self.training else 0.0)

    vars(update)["plain"] = forward
    return update


class Combiner(Operator):
    """Combines the outputs of several injections into one, in the composition `Fuse`; it has no effect by itself.

    With `mixes_inputs` it combines the inputs that the injections pass to the module, and the module (a norm, for
    example) then runs once more on the combined input. Every injection in the composition must only change the module's
    input (`only_inputs`); otherwise an error is raised.
    """

    mixes_inputs = False

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the module's own output."""
        return call(*args, **kwargs)

    def combine(self, outputs: list[Tensor], base: Tensor) -> Tensor:
        """Returns one output, from the outputs of the parts and the module's output without them, all [..., features].

        Raises:
            CompositionError: the outputs have another number of features than the combiner.
        """
        raise NotImplementedError

    def combine_inputs(self, inputs: list[Tensor], base: Tensor, output: Tensor) -> Tensor:
        """Returns one input for the module, from the inputs of the parts, the module's input without the parts, and its
        output for that input, all [..., features]. Called if `mixes_inputs`.

        Raises:
            CompositionError: the inputs have another number of features than the combiner.
        """
        raise NotImplementedError


class Held(ABC):
    """The weight and bias of the module at which an operator acts, in logical layout, for reading."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """``[out, in, *kernel]``."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """``[out]``; None if the module lacks a bias."""


class WeightOperator(_Base):
    """A reparameterization: maps one tensor, in logical layout, to the effective one. Works on every kind of module."""

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the effective tensor for `weight` ``[*batch, out, in, *kernel]``, of the same shape and in any dtype;
        the core casts it once. For a tensor without two dimensions, such as a bias, `weight` is ``[out]``."""
        raise NotImplementedError

    def prefers_activation_form(self, x: Tensor) -> bool:
        """Whether `activation_form` is cheaper than an effective weight for an input ``[..., in]``."""
        return False

    def prepare(self, held: Held) -> Any:
        """Returns values for `activation_form` that no input changes, such as a rotation: small, made of parameters and
        of the module's tensors, at their own precision. In `generate` and `cache_weights` it is called once."""
        return None

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: Any) -> Tensor:
        """Returns the module's output by the same mathematics on activations: `call` is ``W x + b``, `x` ``[..., in]``,
        `prepared` the result of `prepare`.

        Used in training and with gradients, for batches whose rows have different adapters, and on quantized layers, if
        the module is a linear map that is called (`layer.called`) and no other operator acts on its weight. It needs
        neither an effective weight nor a gradient of that size.
        """
        raise NotImplementedError

    def take_base(self, weight: Tensor) -> None:
        """Called with the base weight ``[*batch, out, in, *kernel]`` after a state dict of the whole model has set it.

        Operators that compute with values of the base which their file does not store, such as singular vectors, define
        this function. They are applied and loaded only while no adapter is merged into their tensor.
        """

    def merged(self, weight: Tensor) -> Tensor:
        """Returns `forward` of the weight. An operator with dropout in its forward overrides this, without dropout."""
        merged: Tensor = self(weight)
        return merged


class Replacement(WeightOperator):
    """A trainable value that replaces a tensor while active; the tensor of the base does not change.

    Its initial value is the tensor itself, or zeros if the host lacks the tensor (a missing bias).
    """

    needs_recompute = False
    overrides = True
    stackable = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.value = nn.Parameter(site.weight().detach().clone())

    def forward(self, weight: Tensor | None) -> Tensor:
        return self.value if weight is None else self.value.to(weight.dtype)


def tables(module: nn.Module) -> tuple[Mapping[str, Tensor | None], Mapping[str, Tensor | None]]:
    """Returns a module's own dictionaries of parameters and of buffers."""
    return module._parameters, module._buffers


class Shared:
    """State that several operators use: the surgeon registers and saves it once, so an operator holds a reference but
    does not register it."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module  # of a class that the method knows: its operators read attributes of it


def on_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to a module's output, or to its first entry where it is a tuple (attention: output, weights)."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


def is_mergeable(operator: _Base) -> bool:
    """Whether the operator has an effective weight: it defines `merged`."""
    return isinstance(operator, WeightOperator) or type(operator).merged is not _Base.merged


def changes_bias(operator: _Base) -> bool:
    """Whether the operator changes the bias of its module in addition to the weight."""
    return type(operator).merged_bias is not _Base.merged_bias


def is_made_of_base(operator: nn.Module) -> bool:
    """Whether the operator computes with values of the base that its file does not store: it defines `take_base`."""
    return isinstance(operator, WeightOperator) and type(operator).take_base is not WeightOperator.take_base


def turn_off_dropout(module: nn.Module) -> bool:
    """Set the dropout probabilities of a module and its submodules to 0: those of torch's dropout modules, and
    attributes with a name in `PROBABILITIES`. For trainers that turn off the dropout of the whole model (DPO, KTO), so
    that the policy and its reference differ only by the learned weights.

    Returns:
        Whether the module has a dropout module, whatever its probability was, or such an attribute.
    """
    found = False
    for each in module.modules():
        if isinstance(each, _DropoutNd):
            each.p, found = 0.0, True
        for name in PROBABILITIES:
            if isinstance(value := vars(each).get(name), float) and value:
                setattr(each, name, 0.0)
                found = True
    return found


def trainable_numbers(operators: Iterable[nn.Module]) -> int:
    """Returns the number of distinct trainable values."""
    seen = {id(p): p.numel() for operator in operators for p in operator.parameters() if p.requires_grad}
    return sum(seen.values())
