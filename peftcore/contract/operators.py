"""The trainable modules that methods put at sites. Operators own their parameters and never hold a reference to the
host.

* `Operator`: wraps a module's forward by ``forward(call, *inputs)``. `call` runs the next inner wrapper, or the module
  itself.
* `WeightOperator`: reparameterizes one tensor by ``forward(weight) -> weight``, in logical layout.
* `Replacement`: the weight operator of selective methods. It has a value that replaces the tensor while the adapter is
  active.
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
"""Names of attributes of operators that contain a dropout probability."""
Factors = tuple[Tensor, Tensor, float]
"""``(A, B, scale)`` of a low-rank update ``scale * B A``; A is ``[*batch, rank, in, *kernel]`` and B is ``[*batch, out,
rank]``."""


class Checked(nn.Module):
    """A module that can check values from a file before they are loaded. Values such as indices into a weight can be
    wrong although their shapes and dtypes are right."""

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        """Yields a message for each error in values from a file for this module's own tensors. A message begins with
        the tensor's name.

        Args:
            values: tensors from the file, by their names in this module. They have the right shapes; some may be
                missing.

        Yields:
            ``"index holds places beyond the weight"``.
        """
        yield from ()


class _Base(Checked):
    """Base class of all operators. It stores the `Layer` at which the operator acts, which is plain data, and not the
    host's module."""

    needs_recompute = True
    """True if the operator computes the effective tensor; backward then recomputes it instead of saving it. False if a
    parameter is the effective tensor."""
    observes: frozenset[str] = frozenset()
    """Forms of sites (`Site.form`) at which the operator only reads and changes nothing. There it gets the module's
    original inputs, and its output after all other operators. This holds in routes and compositions too."""
    factors_are_parameters = False
    """True if `factors` returns parameters instead of computed tensors. In training, a route then computes the updates
    of many adapters as one product."""
    changes_inputs = False
    """True if the operator (or `WeightOperator.activation_form`) calls the wrapped module with changed inputs. In a
    route, the module then runs once for the rows of each injection, instead of once for all rows."""
    only_inputs = False
    """True if the operator only changes the input of the module that it wraps, and returns the module's output
    unchanged. A composition can then mix inputs instead of outputs (`Combiner.mixes_inputs`)."""
    stackable = False
    """True if `torch.vmap` can run the forward: it must depend only on its inputs and on the operator's own tensors. In
    a route, operators of several adapters that differ only in values are then computed as one operator with stacked
    tensors."""
    padded: ClassVar[frozenset[str]] = frozenset()
    """Names of the tensors, such as ``"A"`` or ``"down.weight"``, that may be padded with zeros to a larger rank
    without a change of outputs. So the values of an adapter of a smaller rank can be swapped into this one."""
    scaled: ClassVar[frozenset[str]] = frozenset()
    """Names of the tensors, one for each product, that can absorb the attribute `scale`. Only for operators in which
    `scale` has no other effect. So an adapter with another scale can be swapped in: these tensors are multiplied by the
    ratio of the scales."""
    training_only: ClassVar[frozenset[str]] = frozenset({"input_dropout", "dropout"})
    """Names of attributes that have no effect in evaluation. They do not change when another adapter's values are
    swapped in."""
    known_by: ClassVar[frozenset[str]] = frozenset()
    """Names of attributes that identify the operator, such as cache keys. Any two operators have different values of
    them."""
    trains_only = False
    """True if the operator acts only in training; merging skips it."""
    overrides = False
    """True if the operator ignores its input tensor, so earlier adapters on that tensor have no effect."""
    reads_from_base: frozenset[str] = frozenset()
    """Paths of tensors of the model, outside its own site, whose stored values the operator computes with. No other
    adapter may be merged into these tensors while the operator is installed."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.layer = site.layer

    def get_tensor(self, name: str) -> Tensor:
        """Returns a parameter or buffer by its name. Unlike `get_parameter`, it also works within torch.func, where
        parameters are plain tensors."""
        found: Tensor = getattr(self, name)
        return found

    def register_forward_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """Add a hook, like `register_forward_hook` of any module.

        Raises:
            TrainingError: the hook belongs to Opacus, which requires that all inputs of a module are tensors.
        """
        if (getattr(hook, "__module__", None) or "").partition(".")[0] == "opacus":
            raise TrainingError(
                "Opacus computes gradients of single examples only for modules whose inputs are all tensors, but "
                "operators also get the forward that they wrap: pass peftcore.training.PerExample(model) to Opacus, "
                "with grad_sample_mode='no_op'"
            )
        return super().register_forward_hook(hook, **options)

    def merged(self, weight: Tensor) -> Tensor:
        """Returns the effective weight, in logical layout, given the base weight `weight`. A module with this weight
        computes the same as forward.

        Raises:
            NotMergeable: the operator does not override `merged`.
        """
        raise NotMergeable(
            f"{type(self).__name__} has no merged weight, because it does not define `merged`; keep the adapter "
            "unmerged"
        )

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        """Returns the effective bias, to be used with the effective weight from `merged`; by default, the unchanged
        bias. `weight` is a function that returns the base weight, for the few methods whose bias depends on it."""
        return bias

    def base_to_pack(self, weight: Tensor) -> Tensor:
        """Returns the weight that `quantize` quantizes in place of the base weight ``[out, in]``; by default the base
        weight. For methods that adjust the base to its quantization."""
        return weight

    def base_was_packed(self) -> None:
        """Called after the result of `base_to_pack` was quantized and has replaced the base weight."""

    def tables(self) -> Iterator[Mapping[str, Tensor | None]]:
        """Yields the dictionaries of all parameters and buffers of the operator and of the shared modules that it
        uses."""
        for module in self.modules():
            yield from tables(module)
            for held in vars(module).values():
                if isinstance(held, Shared):
                    yield from (table for each in held.module.modules() for table in tables(each))

    def cast(self, like: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns `tensors` converted to the dtype of `like`. Needed under autocast too, which does not convert the
        operands of elementwise products."""
        dtype = like.dtype
        for tensor in tensors:
            if tensor.dtype is not dtype:
                return tuple([each.to(dtype) for each in tensors])
        return tensors  # as nearly always, and at every token

    def check_here(self, values: Tensor, like: Tensor) -> None:
        """Verify that `values`, a tensor of the operator, is available on a real device, as `like` is, and not
        offloaded to the meta device.

        Raises:
            NoWeights: the tensor is offloaded, and no module is called whose hook would restore it.
        """
        if values.is_meta and not like.is_meta:
            raise NoWeights(
                f"{type(self).__name__} reads values that are offloaded, and no module is called here that would "
                "restore them: offload the model first, and apply the method then"
            )

    def drop_nothing(self) -> bool:
        """Turn off the operator's dropout, for trainers that turn off the dropout of the whole model. Override it if
        the operator has dropout that is neither a dropout module of torch nor an attribute called ``dropout`` or
        ``input_dropout``.

        Returns:
            Whether the operator had dropout.
        """
        return turn_off_dropout(self)

    def factors(self) -> Factors | None:
        """Returns the factors of the operator's update, if that is low-rank; otherwise None. Export, routing and
        adapter algebra use them."""
        return None


class Operator(_Base):
    """An operator that wraps the forward of a module: its `forward` gets the inner call and the module's inputs, and
    returns the output.

    For some tensors there is no module that can be called: a parameter that is not in a linear layer or convolution, a
    slice of a fused projection, a grouped convolution. There the core uses `merged` instead of `forward`. So an
    operator that defines both works on every kind of module.
    """

    input_dropout: float = 0.0
    """Probability with which inputs of a low-rank update are dropped in training."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the module with the operator's change, in the shapes and dtypes of `call`.

        Args:
            call: runs the wrapped module on given inputs. It returns a tensor ``[..., out]`` (linear layers), a tensor
                ``[batch, out, *positions]`` (convolutions) or a tuple (some attentions, see `on_first`).
            args: the module's positional inputs.
            kwargs: the module's keyword inputs.

        Raises:
            MissingContext, SequenceError, ConfigError: this call lacks arguments that the operator needs, or has
                arguments that the operator does not support.
        """
        raise NotImplementedError

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        """Returns the callable that wraps a module; by default the operator itself. An operator that acts on several
        modules may return a different callable for each form of site. It may read `module` here, but must not store
        it."""
        return self


Mine = Callable[[Tensor], Tensor | None]
"""Type of functions that get a tensor ``[batch, ...]`` and return a bool mask ``[batch]`` of the rows that belong to
one adapter; None if all rows belong to it."""


class InputOperator(Operator):
    """An operator that only changes the arguments of a module, separately for each row.

    In a route the module runs once for all rows, each row with the arguments that its adapter has changed.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._names = site.arguments

    def arguments(self, given: dict[str, Any], mine: Mine) -> dict[str, Any]:
        """Returns the module's arguments by name, changed only in the rows of the adapter.

        Args:
            given: the original arguments by name.
            mine: a function that returns the mask of the adapter's rows.

        Raises:
            MissingContext, SequenceError, ConfigError: as `Operator.forward`.
        """
        raise NotImplementedError

    def change(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], mine: Mine
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the changed positional and keyword arguments of a call. Arguments that were passed by position are
        passed by position again, as other operators at the module expect."""
        names = self._names[: len(args)]
        changed = self.arguments({**dict(zip(names, args, strict=False)), **kwargs}, mine)
        first = []
        for name in names:
            if name not in changed:
                break
            first.append(changed.pop(name))
        return (*first, *args[len(self._names) :]), changed

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the module for the changed arguments, with all rows changed."""
        args, kwargs = self.change(args, kwargs, _all)
        return call(*args, **kwargs)


def _all(like: Tensor) -> None:
    """Return None: all rows belong to the adapter."""


def low_rank(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator for the forward of an operator that only adds a low-rank update: ``call(x) + scale * B A dropout(x)``.
    A, B and scale are the result of `factors`. In training the dropout probability is `Operator.input_dropout`.

    On layers with a fused kernel for such updates (`Layer.fuses_updates`), the kernel replaces the decorated forward.
    The conformance kit tests that both have equal outputs and gradients.
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
    """Combines the outputs of several injections into one output, when the composition `Fuse` names its injection.
    Outside of `Fuse` it has no effect.

    If `mixes_inputs` is True, it combines the inputs that the injections pass to the module instead. The module, such
    as a norm, then runs once more on the combined input. All operators of the composition at the module must have
    `only_inputs`; otherwise an error is raised.
    """

    mixes_inputs = False

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the module's own output."""
        return call(*args, **kwargs)

    def combine(self, outputs: list[Tensor], base: Tensor) -> Tensor:
        """Returns one output, combined from the outputs of the composition's parts and from `base`, the module's output
        without them. All are [..., features].

        Raises:
            CompositionError: the outputs have another number of features than the combiner.
        """
        raise NotImplementedError

    def combine_inputs(self, inputs: list[Tensor], base: Tensor, output: Tensor) -> Tensor:
        """Returns one input for the module. Called if `mixes_inputs` is True. All tensors are [..., features].

        Args:
            inputs: the inputs that the composition's parts pass to the module.
            base: the module's input without the parts.
            output: the module's output for `base`.

        Raises:
            CompositionError: the inputs have another number of features than the combiner.
        """
        raise NotImplementedError


class Held(ABC):
    """Read access to the weight and bias of the module at which an operator acts, in logical layout."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight, ``[out, in, *kernel]``."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The bias, ``[out]``; None if the module has no bias."""


class WeightOperator(_Base):
    """An operator that reparameterizes one tensor: it maps the base tensor, in logical layout, to the effective tensor.
    It works on every kind of module."""

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the effective tensor for the base tensor `weight`, in the same shape ``[*batch, out, in, *kernel]``,
        or ``[out]`` for a bias and other vectors. It may have any dtype; the core casts it."""
        raise NotImplementedError

    def prefers_activation_form(self, x: Tensor) -> bool:
        """Whether `activation_form` is cheaper for an input ``[..., in]`` than computing the effective weight."""
        return False

    def prepare(self, held: Held) -> Any:
        """Returns values for `activation_form` that do not depend on the input, such as a rotation. They should be
        small, and are computed from parameters and from the module's tensors in the dtype of these. In `generate` and
        `cache_weights` they are computed once and reused."""
        return None

    def activation_form(self, call: Callable[..., Tensor], x: Tensor, prepared: Any) -> Tensor:
        """Returns the module's output, computed from activations without an effective weight. It must equal the output
        of the module with the effective weight.

        Used in training and with gradients, for batches whose rows have different adapters, and on quantized layers.
        The module must be a linear map that the host calls (`layer.called`), and no other operator may act on its
        weight.

        Args:
            call: computes ``W x + b`` with the base weight and bias.
            x: the input ``[..., in]``.
            prepared: the result of `prepare`.
        """
        raise NotImplementedError

    def take_base(self, weight: Tensor) -> None:
        """Update the operator from the base weight ``[*batch, out, in, *kernel]``. Called after a state dict of the
        whole model was loaded into the base.

        Define it if the operator computes with values derived from the base that are not stored in files, such as
        singular vectors. Such operators can be applied and loaded only while no adapter is merged into their tensor.
        """

    def merged(self, weight: Tensor) -> Tensor:
        """Returns `forward` of the weight. Override it if forward has dropout, to leave the dropout out."""
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
    """A module that several operators share. It is registered and saved once for the injection. An operator has a
    reference to it, but does not register it as a submodule."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module  # of a class that the method knows: its operators read attributes of it


def on_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a module's output with `change` applied. If the output is a tuple, such as an attention's output and
    weights, `change` is applied to the first entry."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


def is_mergeable(operator: _Base) -> bool:
    """Whether the operator has an effective weight, which means that it defines `merged`."""
    return isinstance(operator, WeightOperator) or type(operator).merged is not _Base.merged


def changes_bias(operator: _Base) -> bool:
    """Whether the operator changes the bias of its module in addition to the weight."""
    return type(operator).merged_bias is not _Base.merged_bias


def is_made_of_base(operator: nn.Module) -> bool:
    """Whether the operator computes with values of the base that are not stored in its file, which means that it
    defines `take_base`."""
    return isinstance(operator, WeightOperator) and type(operator).take_base is not WeightOperator.take_base


def turn_off_dropout(module: nn.Module) -> bool:
    """Set the dropout probabilities of a module and its submodules to 0. They are those of torch's dropout modules, and
    attributes with a name in `PROBABILITIES`. Trainers for DPO and KTO need this, so that the policy and its reference
    differ only by the learned weights.

    Returns:
        Whether the module has a dropout module with any probability, or an attribute with a name in `PROBABILITIES`
            above 0.
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
    """Returns the number of trainable values of the operators. Parameters that several operators share count once."""
    seen = {id(p): p.numel() for operator in operators for p in operator.parameters() if p.requires_grad}
    return sum(seen.values())
