"""`Method`, the base class of all methods: a final subclass has a name, a `Config`, `Tags`, default targets by role,
and `inject`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from peftcore.contract.batches import Batches
from peftcore.contract.config import MethodConfig, validate
from peftcore.contract.installed_methods import AppliedMethod
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import PluginError
from peftcore.targets.sites import Site

CATEGORIES = (
    "additive",
    "reparameterized",
    "selective",
    "hybrid",
    "quantized",
    "multitask",
    "vision",
    "diffusion",
)
"""The categories of methods, from the survey arXiv 2410.19878. Each category has one official plugin."""

MATRICES: tuple[str | tuple[str, ...], ...] = (
    "attn.*",
    ("ssm.in", "ssm.out"),
    ("mlp.gate", "mlp.up", "mlp.down"),
    "all-layers",
)
"""`Method.alternatives` of methods that act on the matrices of attention. In order: whole matrices of an attention
whose query, key and value slices are not known; the projections of a state-space model; the matrices of feed-forward
networks; all matrices and convolutions."""
OUTPUTS: tuple[str | tuple[str, ...], ...] = ("ssm.output", "conv.output", "all-layers")
"""`Method.alternatives` of methods that act on the outputs of a block's branches (attention and MLP)."""


@dataclass(frozen=True)
class Tags:
    """The abilities that a method declares. The conformance kit tests them, and fails if a method can do less or more
    than it declares."""

    category: str
    """One of `CATEGORIES`."""
    paper: str
    """arXiv number of the paper that defines the method, or another reference."""
    mergeable: bool = False
    """Whether `merge` works: it folds the adapter's effect into the host's tensors, and outputs stay the same."""
    identity_at_init: bool = True
    """Whether a fresh injection with default options leaves the host's outputs unchanged, up to rounding."""
    identity_options: Mapping[str, Any] | None = None
    """Options with which a fresh injection leaves the host's outputs unchanged, if it changes them with the default
    options."""
    per_row: bool = True
    """Whether `route` works: it selects a different injection for each row of a batch."""
    low_rank: bool = False
    """Whether `factors()` of every operator returns the update as A, B and a scale. Operators that merging skips may
    return None."""
    needs_data: bool = False
    """Whether `calibrate` uses the user's data before training, so that `apply` needs ``data=``."""
    scheduled: bool = False
    """Whether `on_step` changes the adapter while it trains, so that the number of optimizer steps must be known in
    advance."""
    random: bool = False
    """Whether forwards in training, with default options, draw random numbers from torch's global generator."""
    exact_gradient: bool = True
    """Whether gradients are the exact gradients of forward. False if the paper uses others: for example, if backward
    treats a rounding as the identity, or a norm as a constant."""
    data_options: Mapping[str, Any] | None = None
    """The options with which the method needs data, if it does not always need data: ``{"start": "gradient"}``, or
    ``{"score": ("snip", "grasp")}`` for several values. `needs_data` then describes the default options."""
    routes: Literal["token", "sequence", "task"] | None = None
    """For mixtures of experts: the unit that the operators (`Router`) distribute over the experts. Each unit has a
    share of each expert, and `Injection.report` returns these shares. None for other methods."""
    reentrant: bool = True
    """Whether the method, with default options, trains under reentrant gradient checkpointing of single blocks. If
    False, that raises TrainingError, and only checkpointing with ``use_reentrant=False`` works."""
    whole_graph: bool = True
    """Whether torch.compile, with default options, makes one graph of the model (``fullgraph=True``). If False, the
    graph breaks."""


@dataclass(frozen=True)
class LearningRate:
    """The learning rate with which a method's authors trained it, and its source."""

    rate: float
    """The rate of the optimizer at the peak of its schedule."""
    source: str
    """``"repository@commit, file"``, or the paper and the place in it."""
    on: str
    """The model and the data for which this learning rate was used."""
    optimizer: str = "AdamW"
    """The name of the class in `torch.optim` that is the source's optimizer, or most similar to it."""
    momentum: float = 0.0
    """The momentum, if the optimizer is SGD."""

    def __str__(self) -> str:
        return f"{self.rate:g} ({self.optimizer}; {self.on}): {self.source}"


class GradientRule(ABC):
    """A method's rule that changes each gradient before the optimizer uses it, and may change each update before it is
    applied.

    Attributes:
        state: the rule's tensors and numbers for each parameter. They are saved with the optimizer's own state.
    """

    def __init__(self) -> None:
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)

    @abstractmethod
    def project(self, grad: Tensor, param: nn.Parameter) -> Tensor:
        """Returns the gradient that the optimizer uses. If it is `grad` itself, the rule does not affect this
        parameter."""

    def restore(self, update: Tensor, param: nn.Parameter) -> Tensor:
        """Returns the change to add to the parameter. `update` is the optimizer's update, in the shape of the gradient
        that `project` returned.

        If a rule defines this, the optimizer does not update the parameter itself, but a tensor of zeros in the
        projected shape. So its state has that shape too. Weight decay is applied to the parameter afterwards, decoupled
        from the gradient. Optimizers that scale updates by the size of the parameter (Adafactor, LARS) get zeros as the
        parameter.
        """
        return update


class Method(ABC):
    """Base class of methods. Subclasses are final. A variant of a method is an option of it, if the code of the paper
    has it as an option, or if it changes only the initialization, the data or the schedule.

    The argument `injection` of the functions below is an `Injection`, or a `HybridPart` if the method is a part of a
    hybrid. `AppliedMethod` is the base class of both.
    """

    name: ClassVar[str]
    """The name of the method in `apply` and in files."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names of the method."""
    Config: ClassVar[type[MethodConfig]]
    """The class of the method's options."""
    tags: ClassVar[Tags]
    """The abilities of the method."""
    learning_rate: ClassVar[LearningRate | None] = None
    """The learning rate of the paper or of its authors' code; None if neither has one."""
    target: ClassVar[str | tuple[str, ...]]
    """Default targets as roles, such as "attn.q", which do not depend on the architecture. Roles that a host lacks are
    skipped."""
    alternatives: ClassVar[tuple[str | tuple[str, ...], ...]] = ()
    """Default targets for hosts in which `target` matches nothing. `apply` uses the first alternative that matches
    anything in the host, and logs which one. Without alternatives, `apply` raises TargetError for such a host. For a
    method with alternatives, `apply` also logs the blocks of the host that its default targets leave out. See
    `MATRICES` and `OUTPUTS`."""
    reads_tokens: ClassVar[bool] = False
    """Whether operators of the method use `forward_context().tokens`. If so, tokens are counted before each forward."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Method not in cls.__bases__:
            raise PluginError(f"{cls.__name__} subclasses another method; methods are final, share functions instead")

    config_version: ClassVar[int] = 1
    """The version of the options. Increase it when options change their meaning; `migrate` then converts options in old
    files."""
    former_defaults: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    """One mapping for each former version 1, 2, ... of the options. It has the values, in that version, of options
    whose defaults have changed since or that were added later."""

    @abstractmethod
    def inject(self, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
        """Put operators at target modules, by calls of the surgeon's functions. The host does not change before
        `inject` returns.

        Args:
            model: the host, unchanged.
            config: the method's own `Config`.
            surgeon: an object that finds sites and records the operators for them.

        Raises:
            ConfigError: the options contradict each other, or do not fit this host.
            TargetError: the method does not find any target modules in the host.
            UnsupportedSite: the method cannot act on the target.
        """

    def trainable(self, model: nn.Module, config: Any, injection: AppliedMethod) -> None:
        """Turn on `requires_grad` of the parameters that train; by default, of every parameter of the operators. A plan
        calls it too, with operators on the meta device. So choose by names, shapes and options, not by values."""
        for parameter in injection.parameters():
            parameter.requires_grad = True

    def parts_gathered(self, injection: AppliedMethod) -> None:  # noqa: B027
        """Initialize the tensors whose initial values depend on the method's parts. `peftcore.gather` calls it once,
        after it has copied the values of existing adapters into the parts. The default does nothing. An operator with
        such tensors also initializes them in `__init__`, from fresh parts."""

    def structure(
        self, model: nn.Module, data: Batches, config: Any, sites: Sequence[Site]
    ) -> Mapping[str, Mapping[str, Any] | None]:
        """Choose options of single sites, such as ranks, from the user's data. Runs before operators are built.

        The options become `MethodConfig.overrides`, so that files, plans and parameter counts agree with the operators.
        Overrides of the user take precedence. Each injection has its own method object, which may store values for
        `calibrate`.

        Args:
            model: the host, without the new operators. The method may run it; training mode, gradients and
                `requires_grad` are restored afterwards.
            data: the user's batches, with a progress bar.
            config: the options.
            sites: the sites that will get operators.

        Returns:
            Options by the path of a site, ``{"layers.0.attn.q": {"rank": 4}}``. The value is None for a site that gets
                no operator.

        Raises:
            CalibrationError: the method cannot use the data.
        """
        return {}

    def calibrate(self, model: nn.Module, data: Batches, config: Any, injection: AppliedMethod) -> None:
        """Set values of the operators from the user's data (tags `needs_data` and `data_options`). Runs once, in
        `apply`, after the operators are installed and active. It does not run when an adapter is loaded, so store the
        results in parameters or buffers of the operators.

        Gradients, training mode and `requires_grad` are restored afterwards.

        Raises:
            CalibrationError: the data lacks what the method needs.
            PluginError: the method has one of the tags, but does not define this function.
        """
        raise PluginError(f"{self.name} has the tag needs_data and does not define calibrate")

    @classmethod
    def looks_at_data(cls, config: MethodConfig) -> bool:
        """Whether `calibrate` runs with these options, at any site (tags `needs_data` and `data_options`)."""
        if cls.tags.data_options is None:
            return cls.tags.needs_data
        wanted = {
            option: value if isinstance(value, tuple) else (value,) for option, value in cls.tags.data_options.items()
        }
        return any(
            all({**dict(config), **each}[option] in values for option, values in wanted.items())
            for each in ({}, *config.overrides.values())
        )

    @classmethod
    def asks_for_data(cls, arguments: Mapping[str, Any]) -> bool:
        """Whether `peftcore.apply` with these arguments needs data. Arguments that are not options are ignored.

        Raises:
            ConfigError: an option has an invalid value.
        """
        if cls.tags.data_options is None:
            return cls.tags.needs_data
        options = {name: value for name, value in arguments.items() if name in cls.Config.model_fields}
        return cls.looks_at_data(validate(cls.Config, options))

    def on_step(self, injection: AppliedMethod, step: int, total: int) -> None:
        """Change the adapter on a schedule (tag `scheduled`). Runs after each step 1, 2, …, `total` of the optimizer,
        before the gradients of that step are cleared. Store state that only a resumed training needs in non-persistent
        buffers of the operators. They are saved with the optimizer's state.

        Raises:
            PluginError: the method has the tag, but does not define this function.
        """
        raise PluginError(f"{self.name} has the tag scheduled and does not define on_step")

    def check_steps(self, config: Any, total: int) -> None:  # noqa: B027
        """Verify that the schedule of `on_step` fits into `total` steps. Called before the first step, as soon as the
        number of steps is known.

        Raises:
            TrainingError: the schedule does not fit.
        """

    def follows_steps(self, config: Any) -> bool:
        """Returns whether `on_step` changes anything with these options; by default, the value of the tag `scheduled`.
        If False, the user need not pass the number of steps."""
        return self.tags.scheduled

    def aux_loss(self, injection: AppliedMethod) -> Tensor | None:
        """Returns a loss to add to the host's loss in training, once a step: a tensor of shape ``[]``, or None."""
        return None

    def output_loss(self, injection: AppliedMethod, output: Any, call: Any) -> Tensor | None:
        """Returns a loss computed from the host's output, to add to the host's loss in training: a tensor of shape
        ``[]``, or None. It must be a mean over the unmasked values. In a step with several forwards, it is scaled like
        the host's own loss.

        Args:
            injection: the adapter.
            output: the host's output; in a route, only the rows of this injection.
            call: the `ForwardContext` of the forward. ``call.inputs`` has the host's arguments by name, such as labels,
                and ``call.context`` the values passed to `peftcore.call`. In a route, both have only the rows of this
                injection.
        """
        return None

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        """Returns the parameter groups for a torch optimizer; `defaults` are the optimizer's options besides `lr`.
        Trainable parameters outside these groups, such as modules that the user named in ``train``, get one more group,
        with `lr`."""
        return [{"params": [p for p in injection.parameters() if p.requires_grad], "lr": lr, **defaults}]

    def gradient_rule(self, injection: AppliedMethod) -> GradientRule | None:
        """Returns the rule that changes gradients before the optimizer uses them, and updates before they are applied;
        None if the method has no such rule."""
        return None

    @staticmethod
    @abstractmethod
    def parameter_count(site: Any, config: Any) -> int:
        """Returns the number of values in the parameters of the operator at one target module, including frozen
        parameters. Use the closed formula of the paper; the conformance kit compares the result with the actual number.

        Raises:
            ConfigError: the number depends on more than the options of one site.
        """

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        """Converts the options of a file (values as in JSON) from `version` to ``version + 1``, and returns them. By
        default, options that the file lacks get their values from `former_defaults`."""
        former = cls.former_defaults[version - 1 : version]
        return {**former[0], **options} if former else options


def check_method_class(cls: Any) -> type[Method]:
    """Returns `cls`, after verifying that it is a complete method class.

    Raises:
        PluginError: something is missing or wrong; the message names it.
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise PluginError(f"{cls!r} is not a subclass of peftcore.author.Method")
    for attribute, kind in (("name", str), ("tags", Tags), ("target", object), ("Config", type)):
        value = getattr(cls, attribute, None)
        if value is None or not isinstance(value, kind):
            raise PluginError(f"{cls.__name__} must define {attribute}")
    if not issubclass(cls.Config, MethodConfig):
        raise PluginError(f"{cls.__name__}.Config must subclass MethodConfig")
    if cls.tags.category not in CATEGORIES:
        raise PluginError(f"{cls.__name__}: unknown category {cls.tags.category!r}; one of {', '.join(CATEGORIES)}")
    if cls.__abstractmethods__:
        raise PluginError(f"{cls.__name__} must implement {', '.join(sorted(cls.__abstractmethods__))}")
    return cls
