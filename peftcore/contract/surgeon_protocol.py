"""The surgeon, the object with which `Method.inject` puts operators at sites, and the operators that it records."""

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
    """The selections of a saved adapter, which are used unchanged instead of being resolved again."""
    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """The rows (first, end) of token tables that a saved adapter contains, by path of the table."""
    left_out: Collection[str] = ()
    """The paths of sites that get no operator, as the method decided from the user's data (`Method.structure`)."""
    untied: tuple[str, ...] = ()
    """The paths of modules whose trained tensors are not shared with the other modules that hold the same tensor: the
    other modules keep the original tensor.
    """


class Surgeon(ABC):
    """Records the operators that a method puts into a host. Nothing is changed until `inject` has returned."""

    model: nn.Module
    """The host."""
    method: Method
    """The method whose operators are recorded."""
    config: MethodConfig
    """The options of the method."""
    resolver: Resolver
    """Finds modules and tensors of the host, and holds the host map."""
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
    """The sites of each target, by the text of the target; "" for the user's or the default target."""
    notices: list[str]
    """Lines for the user about targets: the alternative that is used, the parts of the host that are left out."""

    @abstractmethod
    def sites(self, target: Target | None = None, *, optional: bool = False) -> list[Site]:
        """Returns the sites of `target`; without one, those of the user's target, or of the method's default targets.

        Default targets select sites in one tower of a multimodal host only, and ignore roles that the host lacks.

        Raises:
            TargetError: nothing matches, and `optional` is False.
            CheckpointError: a file names a site of the method twice, or no sites at all.
        """

    @abstractmethod
    def chosen(self, sites: Sequence[Site]) -> list[Site]:
        """Returns those of the given sites whose modules match the user's target, or all of them if the user did not
        pass a target; in both cases without excluded ones. For methods that find their sites themselves. The result is
        recorded for files, like that of `sites`."""

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
        """Put ``operator(site, config, **own)`` at a site; without `config`, ``operator(site, **own)``. Random initial
        values depend only on the seed and the site's path. The operator is moved to the site's device and to the
        requested dtype. It also acts at `holders`, further sites; see `Operator.at`.

        Raises:
            UnsupportedSite: the operator wraps a forward, but the site is a tensor that is read without a call; or the
                operator acts on a weight that cannot be read; or the user named the site in ``train``.
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
        """Returns the attention at a site, with the sizes of its heads; raises UnsupportedSite if it cannot be
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
        """Returns the stack at a site, for an operator that acts around the stack itself; raises UnsupportedSite if the
        site is not a stack."""

    @abstractmethod
    def blocks_of(self, site: Site) -> int:
        """Returns the number of blocks of the stack at a site; raises UnsupportedSite if the site is not a stack."""

    @abstractmethod
    def include(self, part: str, method: Method, config: MethodConfig, target: Target | None = None) -> None:
        """Include another method as a part of this method (a hybrid). The operators, shared modules and selections of
        the part are recorded under its name.

        Raises:
            CompositionError: the part would replace a tensor by a trainable value, but an earlier part changes that
                tensor.
        """

    @abstractmethod
    def collect(self, part: str, method: Method, config: MethodConfig, target: Target | None = None) -> list[Graft]:
        """Returns the operators of another method, which is a part of this method. They are not installed: this method
        uses them as children of its own operators. The part's shared modules and selections are recorded as by
        `include`."""

    @abstractmethod
    def own(self, name: str, module: Callable[[], nn.Module]) -> Shared:
        """Returns a module as state that several operators share: built on the first call with its name, and registered
        and saved once."""

    @abstractmethod
    def replace(self, site: Site) -> Replacement:
        """Replace the site's tensor by a trainable value of the same shape, stored like the host's tensor. All modules
        that are tied to the tensor get the same value, except modules that a file unties.

        Raises:
            UnsupportedSite: the tensor already has an operator.
        """

    @abstractmethod
    def train(self, path: str) -> list[Replacement]:
        """Replace every parameter of the module at `path` and below (or the one parameter of that name).

        Raises:
            TargetError: there is neither a module nor a parameter at `path`.
            UnsupportedSite: one of the parameters already has an operator.
        """
