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
"""The categories of the survey arXiv 2410.19878; a plugin of ours for each."""

MATRICES: tuple[str | tuple[str, ...], ...] = (
    "attn.*",
    ("ssm.in", "ssm.out"),
    ("mlp.gate", "mlp.up", "mlp.down"),
    "all-layers",
)
"""Alternatives (`Method.alternatives`) of methods that act on the matrices of attention: whole matrices of an attention
whose query slices are not known, the projections of a state-space model, the matrices of a mixer, all matrices and
convolutions."""
OUTPUTS: tuple[str | tuple[str, ...], ...] = ("ssm.output", "conv.output", "all-layers")
"""Alternatives of methods that act on the outputs of a block's branches."""


@dataclass(frozen=True)
class Tags:
    """The abilities of a method, declared here and tested by the conformance kit, which fails if a method can do less
    or more than it declares."""

    category: str
    """One of `CATEGORIES`."""
    paper: str
    """arXiv number of the paper that defines the method, or another reference."""
    mergeable: bool = False
    """The effect can be folded into the host's tensors; `merge` then gives the same outputs."""
    identity_at_init: bool = True
    """A fresh injection with default options leaves the host's outputs unchanged, up to rounding."""
    identity_options: Mapping[str, Any] | None = None
    """If a fresh injection changes outputs by default, as in its paper: the options with which it does not."""
    per_row: bool = True
    """Rows of a batch may go to different injections (`route`)."""
    low_rank: bool = False
    """`factors()` of every operator returns the update as A, B and a scale; only operators that merging skips return
    None."""
    needs_data: bool = False
    """`calibrate` uses the user's data before training; `apply` then needs ``data=``."""
    scheduled: bool = False
    """`on_step` changes the adapter while it trains, so the number of optimizer steps must be known in advance."""
    random: bool = False
    """With default options, forwards in training draw random numbers, from torch's global generator."""
    exact_gradient: bool = True
    """Gradients are the exact gradients of forward. False if the paper uses other gradients: through a rounding as if
    it were the identity, or with a norm held constant."""
    data_options: Mapping[str, Any] | None = None
    """The options that need data, if only some do: ``{"start": "gradient"}``, or ``{"score": ("snip", "grasp")}`` if
    several values do. `needs_data` is then about the default options."""
    routes: Literal["token", "sequence", "task"] | None = None
    """The unit that the operators (`Router`) of a mixture distribute over experts: each unit gets its shares of the
    experts, which `Injection.report` returns. None for methods that are not mixtures."""
    reentrant: bool = True
    """With default options the method trains under reentrant checkpoints of single blocks. If False, those raise
    TrainingError, and only checkpoints with ``use_reentrant=False`` work."""
    whole_graph: bool = True
    """With default options torch.compile makes one graph of the model (``fullgraph=True``). If False, the graph
    breaks."""


@dataclass(frozen=True)
class LearningRate:
    """The learning rate with which a method's authors trained it, and its source."""

    rate: float
    """The rate of the optimizer at the peak of its schedule."""
    source: str
    """``"repository@commit, file"``, or the paper and the place in it."""
    on: str
    """The model and the data."""
    optimizer: str = "AdamW"
    """The class of `torch.optim` that is the source's optimizer, or the nearest."""
    momentum: float = 0.0
    """The momentum, where the optimizer is SGD."""

    def __str__(self) -> str:
        return f"{self.rate:g} ({self.optimizer}; {self.on}): {self.source}"


class GradientRule(ABC):
    """A method's rule that changes each gradient before the optimizer sees it, and the optimizer's update.

    Attributes:
        state: the rule's state of each parameter: tensors and numbers, saved with the optimizer's own state.
    """

    def __init__(self) -> None:
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)

    @abstractmethod
    def project(self, grad: Tensor, param: nn.Parameter) -> Tensor:
        """Returns the gradient for the optimizer; `grad` itself leaves the parameter to the optimizer as it is."""

    def restore(self, update: Tensor, param: nn.Parameter) -> Tensor:
        """Returns the change to add to the parameter, for an `update` in the shape that `project` gave.

        Where a rule defines this, the optimizer works on zeros in the projected shape, so its state has that shape too.
        Weight decay is then applied to the parameter afterwards, decoupled from the gradient; optimizers that scale
        updates by the size of the parameter (Adafactor, LARS) see zeros.
        """
        return update


class Method(ABC):
    """Base class of methods. Subclasses are final: a variant is an option if the paper's own code has it as one, or if
    it changes only the initialization, the data or the schedule.

    The argument `injection` of the functions is an `Injection`, or a `HybridPart` if the method is a part of a hybrid;
    `AppliedMethod` is the base class of both.
    """

    name: ClassVar[str]
    """The name by which `apply` and files find it."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names of the method."""
    Config: ClassVar[type[MethodConfig]]
    """The class of the method's options."""
    tags: ClassVar[Tags]
    """The abilities of the method."""
    learning_rate: ClassVar[LearningRate | None] = None
    """The learning rate of the paper or of its authors' code; None where neither says one."""
    target: ClassVar[str | tuple[str, ...]]
    """Default targets, by role, so that one line serves every architecture; roles that a host lacks are skipped."""
    alternatives: ClassVar[tuple[str | tuple[str, ...], ...]] = ()
    """Default targets for hosts without any of `target`: `apply` uses the first alternative that matches anything in
    the host, and logs it in one line; see `MATRICES` and `OUTPUTS`. Without alternatives such a host is a TargetError.
    For a method with alternatives, the blocks that its default targets leave out are logged too."""
    reads_tokens: ClassVar[bool] = False
    """Whether its operators ask `forward_context().tokens`, which are counted before the forward."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Method not in cls.__bases__:
            raise PluginError(f"{cls.__name__} subclasses another method; methods are final, share functions instead")

    config_version: ClassVar[int] = 1
    """Raised when options change their meaning; `migrate` then upgrades old ones."""
    former_defaults: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    """For files of version 1, 2, ...: the defaults that have changed since, and the values of options that were added
    later."""

    @abstractmethod
    def inject(self, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
        """Put operators at target modules, through the surgeon's verbs. The host does not change before `inject`
        returns.

        Args:
            model: the host, unchanged.
            config: the method's own `Config`.
            surgeon: the surgeon, which finds sites and records the operators for them.

        Raises:
            ConfigError: the options contradict each other, or do not fit this host.
            TargetError: the method does not find any target modules in the host.
            UnsupportedSite: the method cannot act on the target.
        """

    def trainable(self, model: nn.Module, config: Any, injection: AppliedMethod) -> None:
        """Turn on requires_grad of the parameters that train: by default of every parameter of the operators. A plan
        calls it too, with operators on the meta device: choose by names, shapes and options."""
        for parameter in injection.parameters():
            parameter.requires_grad = True

    def parts_gathered(self, injection: AppliedMethod) -> None:  # noqa: B027
        """Initialize the tensors whose initial values depend on the method's parts. `peftcore.gather` calls it once,
        after it has copied the values of existing adapters into the parts; by default no tensor depends on them. An
        operator whose tensors do also initializes them in `__init__`, from fresh parts."""

    def structure(
        self, model: nn.Module, data: Batches, config: Any, sites: Sequence[Site]
    ) -> Mapping[str, Mapping[str, Any] | None]:
        """Look at the user's data before operators are built, and decide options of single sites, such as ranks.

        The options become `MethodConfig.overrides`, so that file, plan and count agree with the operators. Overrides of
        the user take precedence. Each injection has its own method object, which may store values for `calibrate`.

        Args:
            model: the host, without the new operators; the method may run it: its modes, gradients and flags are
                restored.
            data: the user's batches, with a progress bar.
            config: the options.
            sites: the sites that will get operators.

        Returns:
            Options by the path of a site, ``{"layers.0.attn.q": {"rank": 4}}``; None for a site that gets no operator.

        Raises:
            CalibrationError: the method cannot use the data.
        """
        return {}

    def calibrate(self, model: nn.Module, data: Batches, config: Any, injection: AppliedMethod) -> None:
        """Look at data before training (tags `needs_data` and `data_options`). Runs once, in `apply`, when the
        operators are installed and active; never on loading, so its results go into parameters or buffers of the
        operators.

        Gradients, training mode and `requires_grad` are restored afterwards.

        Raises:
            CalibrationError: the data lacks what the method needs.
            PluginError: the method has a tag but not this function.
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
        """Change the adapter after step 1, 2, …, `total` of the optimizer, before the gradients of that step are
        cleared (tag `scheduled`). Keep state that only a resumed training needs in non-persistent buffers of the
        operators: the optimizer saves them.

        Raises:
            PluginError: the method has the tag but not this function.
        """
        raise PluginError(f"{self.name} has the tag scheduled and does not define on_step")

    def check_steps(self, config: Any, total: int) -> None:  # noqa: B027
        """Verify that the schedule of `on_step` fits into `total` steps. Called before the first step, as soon as the
        number of steps is known.

        Raises:
            TrainingError: it does not.
        """

    def follows_steps(self, config: Any) -> bool:
        """Returns whether `on_step` changes anything with these options; by default, the tag `scheduled`. If False, the
        user need not pass the number of steps."""
        return self.tags.scheduled

    def aux_loss(self, injection: AppliedMethod) -> Tensor | None:
        """Returns a loss to add to the host's loss in training, once a step: a tensor of shape ``[]``, or None."""
        return None

    def output_loss(self, injection: AppliedMethod, output: Any, call: Any) -> Tensor | None:
        """Returns a loss computed from the host's output, to add to the host's loss in training: a tensor of shape
        ``[]``, or None. Like `aux_loss` it is a mean over the values that count; in a step with several forwards it is
        scaled like the host's own loss.

        Args:
            injection: the adapter.
            output: the host's output, unchanged; in a route, only the injection's rows of it.
            call: the `ForwardContext` of the forward, with its taps: ``call.inputs`` has the host's arguments by name
                (labels), ``call.context`` the values passed to `peftcore.call`; in a route, only the injection's rows
                of both.
        """
        return None

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        """Returns the parameter groups for a torch optimizer; `defaults` are its other options. Trainable parameters
        outside of these groups (modules that the user named in ``train``) get one more group, with `lr`."""
        return [{"params": [p for p in injection.parameters() if p.requires_grad], "lr": lr, **defaults}]

    def gradient_rule(self, injection: AppliedMethod) -> GradientRule | None:
        """Returns a rule that changes gradients before the optimizer uses them, and the optimizer's updates before they
        are applied; or None."""
        return None

    @staticmethod
    @abstractmethod
    def parameter_count(site: Any, config: Any) -> int:
        """Returns the number of values in the parameters of the operator at one target module, frozen ones included, by
        the closed formula of the paper; the kit compares it with the actual number.

        Raises:
            ConfigError: the number depends on more than the options of one site.
        """

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        """Returns the options of a file of `version` (values as in JSON) as options of ``version + 1``: by default,
        options that the file lacks get their `former_defaults`."""
        former = cls.former_defaults[version - 1 : version]
        return {**former[0], **options} if former else options


def check_method_class(cls: Any) -> type[Method]:
    """Returns the class, if it fulfils the contract.

    Raises:
        PluginError: naming what is missing.
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
