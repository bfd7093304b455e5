"""`Method`, the base class of all methods: a final subclass has a name, a `Config`, `Tags`, default targets by role,
and `inject`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from peftcore.contract.config import MethodConfig, validate
from peftcore.errors import PluginError

if TYPE_CHECKING:
    from peftcore.forward.context.context import ForwardContext
    from peftcore.injection.applied import AppliedMethod
    from peftcore.surgery.surgeon import Surgeon
    from peftcore.targets.sites import Site
    from peftcore.training.batches import Batches
    from peftcore.training.optimizer import GradientRule

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
whose queries nobody can tell, the projections of a state-space model, those of a mixer, all matrices and
convolutions."""
OUTPUTS: tuple[str | tuple[str, ...], ...] = ("ssm.output", "conv.output", "all-layers")
"""Alternatives of methods that act on what branches of a block put out."""


@dataclass(frozen=True)
class Tags:
    """The abilities of a method, declared here and tested by the conformance kit: claiming too much and claiming too
    little both fail."""

    category: str
    """One of `CATEGORIES`."""
    paper: str
    """arXiv number of the paper that defines the method, or another reference."""
    mergeable: bool = False
    """The effect can be folded into the host's tensors; `merge` then gives the same outputs."""
    identity_at_init: bool = True
    """A fresh injection with default options leaves the host's outputs unchanged, up to rounding."""
    identity_options: Mapping[str, Any] | None = None
    """Where a fresh injection changes outputs, as the paper has it: the options with which it does not."""
    per_row: bool = True
    """Rows of a batch may go to different injections (`route`)."""
    low_rank: bool = False
    """`factors()` of every operator gives the update as A, B and a scale; those that merging leaves out have none."""
    needs_data: bool = False
    """`calibrate` uses the user's data before training; `apply` then needs ``data=``."""
    scheduled: bool = False
    """`on_step` changes the adapter while it trains, so the optimizer must know how many steps there will be."""
    random: bool = False
    """With default options, forwards in training draw random numbers, from torch's global generator."""
    exact_gradient: bool = True
    """Gradients are those of what forward computes. Not where a paper takes others: through a rounding as if it were
    not there, or with a norm held constant."""
    data_options: Mapping[str, Any] | None = None
    """Where only some options need data, these: ``{"start": "gradient"}``, or ``{"score": ("snip", "grasp")}``, where
    each of several values does. `needs_data` then speaks of the defaults."""
    routes: Literal["token", "sequence", "task"] | None = None
    """The unit to each of which the operators (`Router`) of a mixture give shares of experts, which `Injection.report`
    tells; None for methods that are no mixtures."""
    reentrant: bool = True
    """With default options it trains under reentrant checkpoints of single blocks; else these are a TrainingError, and
    only the others work (``use_reentrant=False``)."""
    whole_graph: bool = True
    """With default options torch.compile makes one graph of the model (``fullgraph=True``); else it needs breaks."""


@dataclass(frozen=True)
class LearningRate:
    """The learning rate with which those who made a method trained it, and where they say so."""

    rate: float
    """The rate that the optimizer was given, at the top of its schedule."""
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


class Method(ABC):
    """Base class of methods. Subclasses are final: a variant is an option where the paper's own code has it as one, or
    where it changes only the start, the data or the schedule.

    The functions get as `injection` an `Injection`, or a `HybridPart` where the method is a part of a hybrid: an
    `AppliedMethod`, the base class of both.
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
    """Default targets, by role, so that one line serves every architecture; roles that a host lacks are passed over."""
    alternatives: ClassVar[tuple[str | tuple[str, ...], ...]] = ()
    """Default targets for hosts that have none of `target`: the first of which a host has any part is taken, and
    `apply` says which in one line; see `MATRICES` and `OUTPUTS`. Without them such a host is a TargetError. A method
    that has them also says which blocks its default targets leave out."""
    reads_tokens: ClassVar[bool] = False
    """Whether its operators ask `forward_context().tokens`, which are counted before the forward."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Method not in cls.__bases__:
            raise PluginError(f"{cls.__name__} subclasses another method; methods are final, share functions instead")

    config_version: ClassVar[int] = 1
    """Raised when options change their meaning; `migrate` then upgrades old ones."""
    former_defaults: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    """Options of files of version 1, 2, ...: defaults that are others now, and values of options that came later."""

    @abstractmethod
    def inject(self, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
        """Put operators at target modules, through the surgeon's verbs. Nothing changes before it returns.

        Args:
            model: the host, as it came.
            config: the method's own `Config`.
            surgeon: finds sites and records the operators for them.

        Raises:
            ConfigError: options that do not go together, or not with this host.
            TargetError: there is nothing to act on.
            UnsupportedSite: the method cannot act on the target.
        """

    def trainable(self, model: nn.Module, config: Any, injection: AppliedMethod) -> None:
        """Turn on requires_grad of the parameters that train: by default of every parameter of the operators. A plan
        calls it too, with operators on the meta device: choose by names, shapes and options."""
        for parameter in injection.parameters():
            parameter.requires_grad = True

    def parts_gathered(self, injection: AppliedMethod) -> None:  # noqa: B027
        """Set what starts from the values of the method's parts. `peftcore.gather` calls it once, when it has copied
        the values of existing adapters into the parts; by default nothing starts from them. An operator that starts
        from its parts does so in its own `__init__` too, where parts are fresh."""

    def structure(
        self, model: nn.Module, data: Batches, config: Any, sites: Sequence[Site]
    ) -> Mapping[str, Mapping[str, Any] | None]:
        """Look at the user's data before operators are built, and decide options of single sites, such as ranks.

        They become `MethodConfig.overrides`, so file, plan and count agree with what is built. Overrides that the user
        gave come first. The method's object is one injection's own, so it may keep what `calibrate` goes on with.

        Args:
            model: the host, without the new operators; it may be run, its modes, gradients and flags are restored.
            data: the user's batches, behind a progress bar.
            config: the options.
            sites: the sites at which operators will stand.

        Returns:
            Options by the path of a site, ``{"layers.0.attn.q": {"rank": 4}}``; None for a site that gets no operator.

        Raises:
            CalibrationError: the data is of no use.
        """
        return {}

    def calibrate(self, model: nn.Module, data: Batches, config: Any, injection: AppliedMethod) -> None:
        """Look at data before training (tags `needs_data` and `data_options`). Runs once, in `apply`, when the
        operators are installed and active; never on loading, so its results go into parameters or buffers of the
        operators.

        Gradients, training mode and `requires_grad` are put back afterwards.

        Raises:
            CalibrationError: the data lacks what the method needs.
            PluginError: the method has a tag and no such function.
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
        """Whether `peftcore.apply` with these arguments needs data: those of them that are options count.

        Raises:
            ConfigError: an option has a value that is none for it.
        """
        if cls.tags.data_options is None:
            return cls.tags.needs_data
        options = {name: value for name, value in arguments.items() if name in cls.Config.model_fields}
        return cls.looks_at_data(validate(cls.Config, options))

    def on_step(self, injection: AppliedMethod, step: int, total: int) -> None:
        """Change the adapter after step 1, 2, …, `total` of the optimizer, while the gradients of that step are still
        there (tag `scheduled`). State that a resumed training needs, and that is of no use afterwards, goes into
        non-persistent buffers of the operators: the optimizer saves them.

        Raises:
            PluginError: the method has the tag and no such function.
        """
        raise PluginError(f"{self.name} has the tag scheduled and does not define on_step")

    def check_steps(self, config: Any, total: int) -> None:  # noqa: B027
        """Verify that the schedule of `on_step` fits into `total` steps; called before the first one, as soon as the
        number is known.

        Raises:
            TrainingError: it does not.
        """

    def follows_steps(self, config: Any) -> bool:
        """Returns whether `on_step` changes anything with these options; by default the tag `scheduled` alone says so.
        Where it does not, nobody has to say how many steps there will be."""
        return self.tags.scheduled

    def aux_loss(self, injection: AppliedMethod) -> Tensor | None:
        """Returns a loss to add to the host's loss in training, once a step: a tensor of shape ``[]``, or None."""
        return None

    def output_loss(self, injection: AppliedMethod, output: Any, call: ForwardContext) -> Tensor | None:
        """Returns a loss of what the host returned, to add to the host's loss in training: a tensor of shape ``[]``, or
        None. Like `aux_loss` it is a mean over what counts, and scaled as the host's own where a step has several
        forwards.

        Args:
            injection: the adapter.
            output: of the host, as it computed it; in a route the injection's own rows of it.
            call: the forward, whose taps are still there: ``call.inputs`` has the host's arguments by name (labels),
                ``call.context`` what `peftcore.call` was told; in a route of its own rows too.
        """
        return None

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        """Returns the parameter groups for a torch optimizer; `defaults` are its other options. Parameters that train
        and are in no group (modules that the user named in ``train``) come in one more, with `lr`."""
        return [{"params": [p for p in injection.parameters() if p.requires_grad], "lr": lr, **defaults}]

    def gradient_rule(self, injection: AppliedMethod) -> GradientRule | None:
        """Returns a rule that changes gradients before the optimizer sees them, and its updates before they are
        applied; or None."""
        return None

    @staticmethod
    @abstractmethod
    def parameter_count(site: Any, config: Any) -> int:
        """Returns the number of values in the parameters of the operator at one target module, frozen ones included, by
        the closed formula of the paper; the kit compares it with the actual number.

        Raises:
            ConfigError: the number does not follow from the options of one site.
        """

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        """Returns the options of a file of `version`, as JSON has them, as options of ``version + 1``: by default with
        the `former_defaults` of what the file does not say."""
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
