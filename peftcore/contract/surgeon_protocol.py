"""`Surgeon`, the object by which `Method.inject` puts operators at sites, and `Graft`, an operator that it has
recorded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from peftcore.contract.config import MethodConfig
from peftcore.contract.operators import Replacement, Shared, _Base
from peftcore.targets.attention_sites import AttentionSite
from peftcore.targets.resolver import Resolver, Target
from peftcore.targets.sequence_sites import SequenceSite
from peftcore.targets.sites import Site

if TYPE_CHECKING:
    from peftcore.contract.method import Method

O = TypeVar("O", bound=_Base)  # noqa: E741


@dataclass(eq=False, slots=True)
class Graft:
    """One operator that a method has put at a site, as `Surgeon` records it."""

    site: Site
    """The site of the operator."""
    operator: _Base
    """The operator itself."""
    holders: tuple[Site, ...]
    """Every (module, tensor) that the operator acts on. There are several if the tensor is tied."""
    by_method: bool
    """True if the method itself put the operator there. False for modules that the user named in ``train``, and for
    rows added to an embedding of the base."""
    part: str = ""
    """The part of a hybrid that the operator belongs to, ``"0/"``; empty for other methods."""

    adds_rows: bool = False
    """Whether the operator contains rows that were added to an embedding table of the base, for new tokens."""

    @property
    def trained_along(self) -> bool:
        """Whether the operator replaces a tensor that the user named in ``train``."""
        return not self.by_method and not self.adds_rows

    @property
    def key(self) -> str:
        """The operator's name in files and in `Injection.operators`: the site's path."""
        return self.part + self.site.path


@dataclass(frozen=True)
class Wishes:
    """The user's arguments of `apply` besides the method's options."""

    target: Target | None = None
    exclude: Target | None = None
    train: tuple[str, ...] = ()
    seed: int = 0
    dtype: torch.dtype = torch.float32
    saved: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
    """The sites of a saved adapter by target. They are used unchanged, and targets are not matched again."""
    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """The range of rows (first, end) of each embedding table that a saved adapter contains, by path of the table."""
    left_out: Collection[str] = ()
    """The paths of sites that get no operator, because `Method.structure` excluded them."""
    untied: tuple[str, ...] = ()
    """The paths of modules that train a copy of a tied tensor. The other modules that share the tensor keep the
    original.
    """


class Surgeon(ABC):
    """Records the operators that a method puts into a host. The host does not change before `Method.inject` has
    returned."""

    model: nn.Module
    """The host."""
    method: Method
    """The method whose operators are recorded."""
    config: MethodConfig
    """The options of the method."""
    resolver: Resolver
    """The object that finds modules and tensors of the host. It also contains the host map."""
    wishes: Wishes
    """The user's arguments besides the method's options."""
    dry: bool
    """Whether this is a dry run: operators are built on the meta device and not installed."""
    part: str
    """The prefix of the paths of a hybrid's part: ``"0/"``."""
    parts: Mapping[str, Surgeon]
    """The parts of a hybrid method, by name."""
    grafts: list[Graft]
    """The operators so far, in the order in which they were recorded."""
    owned: dict[str, Shared]
    """The shared modules built by `own`, by name."""
    selections: dict[str, list[Site]]
    """The sites of each target, by the text of the target. The key "" is the user's target, or the default target."""
    notices: list[str]
    """Messages to the user about targets: which alternative is used, and which parts of the host are left out."""

    @abstractmethod
    def sites(self, target: Target | None = None, *, optional: bool = False) -> list[Site]:
        """Returns the sites that match `target`. Without `target`, the user's target is used, or else the method's
        default targets.

        Default targets select sites in one tower of a multimodal host only, and ignore roles that the host lacks.

        Raises:
            TargetError: nothing matches, and `optional` is False.
            CheckpointError: a file names a site of the method twice, or no sites at all.
        """

    @abstractmethod
    def chosen(self, sites: Sequence[Site]) -> list[Site]:
        """Returns the given sites without those that the user did not target or excluded. If the user did not pass a
        target, only excluded sites are removed. For methods that find their sites themselves. The result is recorded
        for files, like that of `sites`."""

    def at(self, role: str) -> list[Site]:
        """Returns the sites of one role in the main tower; an empty list if the host lacks the role."""
        return self.sites(role, optional=True)

    @abstractmethod
    def graft(
        self,
        site: Site,
        operator: Callable[..., O],
        config: MethodConfig | None = None,
        holders: tuple[Site, ...] = (),
        **own: Any,
    ) -> O:
        """Build ``operator(site, config, **own)`` (without `config`: ``operator(site, **own)``), record it at the site,
        and return it. Random initial values depend only on the seed and the site's path. The operator is moved to the
        site's device and to the requested dtype. With `holders`, it also acts at these sites; see `Operator.at`.

        Raises:
            UnsupportedSite: the operator wraps the forward of a module, but the site is a tensor that is used without
                calling a module. Or the operator acts on a weight that cannot be read. Or the user named the site in
                ``train``.
            PluginError: the method has put an operator at this site before.
        """

    def attention(self, site: Site, operator: Callable[..., O], config: MethodConfig | None = None, **own: Any) -> O:
        """Put ``operator(site, config, **own)``, an `AttentionOperator`, inside an attention module, where it can
        change queries, keys and values.

        Raises:
            UnsupportedSite: the module's attention cannot be edited.
        """
        return self.graft(self.attention_site(site), operator, config, **own)

    @abstractmethod
    def attention_site(self, site: Site) -> AttentionSite:
        """Returns the attention module at a site as a site with the sizes of its heads. Raises UnsupportedSite if its
        attention cannot be edited."""

    @abstractmethod
    def sequence(
        self,
        site: Site,
        operator: Callable[..., O],
        config: MethodConfig | None = None,
        behind: bool = False,
        blocks: Sequence[int] = (),
        counted: bool = False,
        **own: Any,
    ) -> O:
        """Put ``operator(site, config, **own)``, a `SequenceOperator`, at a stack (a module that embeds tokens and runs
        blocks). It inserts virtual tokens in front of the tokens.

        With `behind`, they are inserted after the tokens are embedded and have their positions. With `blocks` (numbers
        of blocks of the stack), the operator is an `InnerRows`, which makes new virtual tokens at each of these blocks.
        Tokens cannot attend to them before the first of the blocks. If block 0 is among the blocks, the virtual tokens
        may be `counted`: then they take up positions, and the positions of tokens start after them.

        Raises:
            UnsupportedSite: the site is not a stack, or virtual tokens cannot be inserted after the stack's embeddings
                or at a block.
            PluginError: `blocks` are given, and the operator is not an `InnerRows`; or `counted` is given without block
                0.
        """

    @abstractmethod
    def sequence_site(self, site: Site) -> SequenceSite:
        """Returns the stack (a module that embeds tokens and runs blocks) at a site, for an operator that wraps the
        whole stack. Raises UnsupportedSite if the site is not a stack."""

    @abstractmethod
    def blocks_of(self, site: Site) -> int:
        """Returns the number of blocks of the stack (a module that embeds tokens and runs blocks) at a site. Raises
        UnsupportedSite if the site is not a stack."""

    @abstractmethod
    def include(self, part: str, method: Method, config: MethodConfig, target: Target | None = None) -> None:
        """Include another method as a part of this method (a hybrid). The operators, shared modules and selections of
        the part are recorded under its name.

        Raises:
            CompositionError: the part would replace a tensor by a trainable value, but an earlier part already changes
                that tensor.
        """

    @abstractmethod
    def collect(self, part: str, method: Method, config: MethodConfig, target: Target | None = None) -> list[Graft]:
        """Returns the operators of another method, without installing them. This method uses them as children of its
        own operators. The other method's shared modules and selections are recorded under the name `part`, as by
        `include`."""

    @abstractmethod
    def own(self, name: str, module: Callable[[], nn.Module]) -> Shared:
        """Returns a module that several operators share. It is built on the first call with this name, and registered
        and saved once."""

    @abstractmethod
    def replace(self, site: Site) -> Replacement:
        """Replace the site's tensor by a trainable value of the same shape and layout. All modules that share the
        tensor (tied weights) get the same value, except modules that the file of a saved adapter unties.

        Raises:
            UnsupportedSite: the tensor already has an operator.
        """

    @abstractmethod
    def train(self, path: str) -> list[Replacement]:
        """Replace every parameter of the module at `path`, and of its submodules, by a trainable value. `path` may also
        be the path of a single parameter.

        Raises:
            TargetError: there is neither a module nor a parameter at `path`.
            UnsupportedSite: one of the parameters already has an operator.
        """
