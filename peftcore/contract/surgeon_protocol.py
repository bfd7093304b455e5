"""The surgeon as a method sees it: the verbs of `Method.inject`, and the operators that they record."""

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
    """One recorded operator."""

    site: Site
    """The site of the operator."""
    operator: _Base
    """The operator itself."""
    holders: tuple[Site, ...]
    """Every (module, tensor) that it acts on: several when a tensor is tied."""
    by_method: bool
    """False for modules that the user named in ``train``, and for rows that were added to the base."""
    part: str = ""
    """The part of a hybrid that the operator belongs to, ``"0/"``; empty for other methods."""

    adds_rows: bool = False
    """Whether the operator holds rows that were added to a token table of the base."""

    @property
    def trained_along(self) -> bool:
        """Whether the user named it in ``train``."""
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
    """Selections of a saved adapter: they are taken as they were instead of being resolved again."""
    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """The range (first, end) of the token table rows that are stored in a saved adapter, by path of the table."""
    left_out: Collection[str] = ()
    """The paths of sites at which the method, having looked at data, puts no operator."""
    untied: tuple[str, ...] = ()
    """The paths of modules whose trained replacements are theirs alone, even if other modules hold the same tensors:
    the other modules keep the originals.
    """


class Surgeon(ABC):
    """Records the operators that a method puts into a host. Nothing is changed until `inject` has returned."""

    model: nn.Module
    """The host."""
    method: Method
    """The method that acts."""
    config: MethodConfig
    """Its options."""
    resolver: Resolver
    """Finds modules and tensors of the host, and has its map."""
    wishes: Wishes
    """The user's arguments besides the method's options."""
    dry: bool
    """Whether this is a dry run, with operators on the meta device and no installation."""
    part: str
    """The prefix of the paths of a hybrid's part: ``"0/"``."""
    parts: Mapping[str, Surgeon]
    """The methods that this one includes, by name of the part."""
    grafts: list[Graft]
    """The operators so far, in the order in which they were recorded."""
    owned: dict[str, Shared]
    """The shared modules built by `own`, by name."""
    selections: dict[str, list[Site]]
    """The sites of each target, by its text; "" for the user's or the default one."""
    notices: list[str]
    """Lines for the user about targets: the alternative that was taken, the parts that are left out."""

    @abstractmethod
    def sites(self, target: Target | None = None, *, optional: bool = False) -> list[Site]:
        """Returns the sites of `target`; without one, those of the user's target, or of the method's default targets.

        Default targets stay in one tower of a multimodal host, and pass over roles that the host lacks.

        Raises:
            TargetError: nothing matches, and it is not `optional`.
            CheckpointError: a file names a site of the method twice, or no sites at all.
        """

    @abstractmethod
    def chosen(self, sites: Sequence[Site]) -> list[Site]:
        """Returns the sites whose modules match the user's target and exclude; all, where the user named no target. For
        methods that find their sites by themselves; like `sites`, recorded for files."""

    def at(self, role: str) -> list[Site]:
        """Returns the sites of one role in the main tower; none when the host lacks the role."""
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
        """Put ``operator(site, config, **own)`` at a site: built from (seed, path), moved to the site's device, in the
        wished dtype. Without `config` it is ``operator(site, **own)``. At `holders` the same operator acts too; see
        `Operator.at`.

        Raises:
            UnsupportedSite: the operator wraps a forward, but the site is a tensor that is read, not called; or it
                acts on a weight that no layer can read; or the site is trained along, as the user asked with ``train``.
            PluginError: the method has grafted this site before.
        """

    def attention(self, site: Site, operator: Callable[..., O], config: MethodConfig | None = None, **own: Any) -> O:
        """Put ``operator(site, config, **own)``, an `AttentionOperator`, inside an attention module: around what its
        queries, keys and values go through.

        Raises:
            UnsupportedSite: the module's attention cannot be edited.
        """
        return self.graft(self.attention_site(site), operator, config, **own)

    @abstractmethod
    def attention_site(self, site: Site) -> AttentionSite:
        """Returns the attention at a site, with the sizes of its heads; raises UnsupportedSite where it cannot be
        edited."""

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
        """Put ``operator(site, config, **own)``, a `SequenceOperator`, at a stack: its virtual tokens are put in front
        of the tokens. With `behind`, they are put there after the tokens are embedded and have their positions. With
        `blocks` (numbers of blocks of the stack), an `InnerRows` makes them at the numbered blocks, and tokens do not
        see them before the first of the blocks. If block 0 is among the blocks, the virtual tokens may be `counted`:
        the positions of tokens then continue after them, as after words.

        Raises:
            UnsupportedSite: the site is not a stack (a module that takes token ids, embeds them and runs blocks); or
                rows cannot be inserted after the embeddings of the stack, or at a block.
            PluginError: `blocks` are given, and the operator is not an `InnerRows`; or rows are `counted` that are
                inserted only after block 0.
        """

    @abstractmethod
    def sequence_site(self, site: Site) -> SequenceSite:
        """Returns the stack at a site, for an operator that acts around the stack itself; raises UnsupportedSite where
        there is none."""

    @abstractmethod
    def blocks_of(self, site: Site) -> int:
        """Returns how many blocks the stack at a site has; raises UnsupportedSite where there is none."""

    @abstractmethod
    def include(self, part: str, method: Method, config: MethodConfig, target: Target | None = None) -> None:
        """Let another method act as one part of this one (a hybrid). The operators, shared modules and selections of
        the part are recorded under its name.

        Raises:
            CompositionError: the part would replace a tensor that an earlier part changes by a value that it trains.
        """

    @abstractmethod
    def collect(self, part: str, method: Method, config: MethodConfig, target: Target | None = None) -> list[Graft]:
        """Returns the operators of another method as a part of this one. They are not installed: this method puts them
        into its own, as children. The part's shared modules and selections are recorded as by `include`."""

    @abstractmethod
    def own(self, name: str, module: Callable[[], nn.Module]) -> Shared:
        """Returns state that sites share, registered and saved once: built on the first call with that name."""

    @abstractmethod
    def replace(self, site: Site) -> Replacement:
        """Let a trainable value replace the site's tensor: one for each tensor, so all modules tied to it see the same,
        but for those that a file unties. It is stored as the host stores the tensor, and has its shape.

        Raises:
            UnsupportedSite: there is an operator already.
        """

    @abstractmethod
    def train(self, path: str) -> list[Replacement]:
        """Replace every parameter of the module at `path` and below (or the one parameter of that name).

        Raises:
            TargetError: there is neither a module nor a parameter at `path`.
            UnsupportedSite: an operator is at one of them.
        """
