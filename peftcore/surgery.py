"""The surgeon: the verbs of a method's `inject`, and the one place where a host changes.

The verbs only record. `install` then puts everything in its place, or nothing; `uninstall` takes it out again, bit for
bit. `plan` is the same recording with operators on the meta device and no installation.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from peftcore.attention_sites import locate as locate_attention
from peftcore.calls import HostState
from peftcore.errors import PluginError, TargetError, UnsupportedHost, UnsupportedSite
from peftcore.graft import attach, detach, slot_of, stance_of, ungraft
from peftcore.mounts import Mount
from peftcore.operators import Operator, Replacement, Shared, WeightOperator, _Base, is_mergeable
from peftcore.targets import Resolver, Site, Target
from peftcore.weights import Layer, Ranges

if TYPE_CHECKING:
    from peftcore.contract import Method, MethodConfig

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules whose children are iterated by others: operators do not live in them."""
HOLDER = "peft"
O = TypeVar("O", bound=_Base)  # noqa: E741


class Operators(nn.Module):
    """Holds operators beside the site they act on: ``self_attn.peft.q_proj.<injection>``."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state dict of the bare base loads into an adapted host: operators that it does not mention keep their
        values."""
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update({prefix + key: value for key, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True, eq=False)
class Graft:
    """One recorded operator: where it stands and every (module, tensor) that it acts on (several when a tensor is
    tied)."""

    site: Site
    operator: _Base
    holders: tuple[Site, ...]
    by_method: bool
    """False for modules that the user named in ``train``."""


@dataclass(frozen=True)
class Wishes:
    """What the user asked for besides the method's options."""

    target: Target | None = None
    exclude: Target | None = None
    train: tuple[str, ...] = ()
    seed: int = 0
    dtype: torch.dtype = torch.float32
    saved: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
    """Selections of a saved adapter: they are taken as they were instead of being resolved again."""


@contextmanager
def drawing(seed: int, path: str) -> Iterator[None]:
    """Random numbers that depend on (seed, path) alone; the global generator does not move."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    try:
        yield
    finally:
        generator.set_state(before)


@dataclass
class Surgeon:
    """What a method may do to a host. Nothing is changed until `inject` has returned."""

    model: nn.Module
    method: Method
    config: MethodConfig
    resolver: Resolver
    wishes: Wishes
    dry: bool = False
    grafts: list[Graft] = field(default_factory=list)
    owned: dict[str, Shared] = field(default_factory=dict)
    selections: dict[str, list[Site]] = field(default_factory=dict)
    _by_method: bool = True
    _paths: set[str] = field(default_factory=set)
    _replaced: dict[tuple[str | int, Ranges | None], Replacement] = field(default_factory=dict)

    def sites(self, target: Target | None = None, *, optional: bool = False) -> list[Site]:
        """The sites of `target`; without one, those the user asked for, or the method's default targets.

        Default targets stay in one tower of a multimodal host, and pass over roles that the host lacks.

        Raises:
            TargetError: nothing matches, and it is not `optional`.
        """
        key = "" if target is None else str(target)
        saved = self.wishes.saved
        try:
            if saved is not None and key in saved:
                found = [self.resolver.site(**record) for record in saved[key]]
            elif target is None and self.wishes.target is not None:
                found = self._matching(self.wishes.target, warn=True)
            else:
                found = self._defaults(self.method.target if target is None else target)
        except TargetError:
            if not optional:
                raise
            found = []
        self.selections[key] = found
        return [replace(site, meta=True) for site in found] if self.dry else found

    def at(self, role: str) -> list[Site]:
        """The sites of one role in the main tower; nothing when the host has none."""
        return self.sites(role, optional=True)

    def graft(self, site: Site, operator: Callable[..., O], config: MethodConfig | None = None) -> O:
        """Put ``operator(site, config)`` at a site: built from (seed, path), moved to the site's device, in the wished
        dtype.

        Raises:
            UnsupportedSite: the operator wraps a forward, but the site is a tensor that is read, not called.
        """
        if site.path in self._paths:
            raise PluginError(f"{self.method.name} grafts {site.path} twice")
        built: O = self._build(
            site.path, lambda: operator(site, config.at(site.path)) if config else operator(site), site
        )
        if isinstance(built, Operator) and site.form == "weight" and not is_mergeable(built):
            raise UnsupportedSite(
                f"{self.method.name} acts on what a module computes, but {site.path} is a tensor that is read, "
                "not called; target what uses it, such as the role attn.output"
            )
        if isinstance(built, WeightOperator):
            site = replace(site, form="weight")
        self._record(Graft(site, built, (site,), self._by_method))
        return built

    def attention(self, site: Site, operator: Callable[..., O], config: MethodConfig | None = None) -> O:
        """Put ``operator(site, config)``, an `AttentionOperator`, inside an attention module: around what its queries,
        keys and values go through.

        Raises:
            UnsupportedSite: the module's attention cannot be edited.
        """
        return self.graft(locate_attention(site, self.resolver), operator, config)

    def own(self, name: str, module: Callable[[], nn.Module]) -> Shared:
        """State that sites share, registered and saved once: built on the first call with that name."""
        if name not in self.owned:
            anywhere = next(self.model.parameters(), torch.empty(0)).device
            self.owned[name] = Shared(self._build(f"shared:{name}", module, None, anywhere))
        return self.owned[name]

    def replace(self, site: Site) -> Replacement:
        """Let a value stand for the site's tensor: one for each tensor, so all that is tied to it sees the same."""
        tensor = site.layer.read(site.module, site.tensor)
        key = (site.path if tensor is None else id(tensor), site.rows)
        if key not in self._replaced:
            site = self._as_stored(site)
            self._replaced[key] = self._build(site.path, lambda: Replacement(site), site)
            self._record(Graft(site, self._replaced[key], tuple(self._tied(site, tensor)), self._by_method))
        return self._replaced[key]

    def train(self, path: str) -> list[Replacement]:
        """Replace every parameter of the module at `path` and below (or the one parameter of that name).

        Raises:
            TargetError: there is neither a module nor a parameter at `path`.
        """
        resolver = self.resolver
        if path not in resolver.modules:
            return [self.replace(resolver.module_site(path))]
        inside = [p for p in resolver.modules if p == path or p.startswith(f"{path}.") or not path]
        sites = [
            resolver.site(p, name)
            for p in inside
            for name, value in resolver.modules[p]._parameters.items()
            if value is not None
        ]
        return [self.replace(replace(site, meta=self.dry)) for site in sites]

    def train_wishes(self) -> None:
        """Record what the user named in ``train``: paths, or ends of paths."""
        self._by_method = False
        for name in self.wishes.train:
            exact = name in self.resolver.modules
            paths = [name] if exact else [_meant(name, site) for site in self.resolver.sites(name)[0]]
            if not [each for path in paths for each in self.train(path)]:
                raise TargetError(f"train: {name!r} has no parameters")
        self._by_method = True

    def _record(self, graft: Graft) -> None:
        if graft.site.path in self._paths:
            raise UnsupportedSite(
                f"{graft.site.path} would be adapted and replaced at once; exclude= it from the target, or leave it "
                "out of train="
            )
        self.grafts.append(graft)
        self._paths.add(graft.site.path)

    def _matching(self, target: Target, warn: bool) -> list[Site]:
        found, unmatched = self.resolver.sites(target, exclude=self.wishes.exclude)
        if unmatched and warn:
            warnings.warn(f"these targets match nothing and are passed over: {unmatched}", UserWarning, stacklevel=2)
        return found

    def _defaults(self, target: Target) -> list[Site]:
        exclude = self.wishes.exclude
        try:
            return self.resolver.sites(target, exclude=exclude, tower=self.resolver.host.main_tower())[0]
        except TargetError:
            return self.resolver.sites(target, exclude=exclude)[0]  # heads and projectors stand outside of all towers

    def _tied(self, site: Site, tensor: Tensor | None) -> Iterator[Site]:
        yield site
        if isinstance(tensor, nn.Parameter) and site.rows is None:
            for path, name in self.resolver.holders(tensor):
                holder = self.resolver.site(path, name)
                if (holder.module_path, holder.tensor) != (site.module_path, site.tensor):
                    yield self._as_stored(holder)

    @staticmethod
    def _as_stored(site: Site) -> Site:
        """A whole tensor is replaced as it is stored, so that holders of different kinds (table, head) share it."""
        return replace(site, form="weight", layer=site.layer if site.rows else Layer())

    def _build(self, path: str, make: Callable[[], Any], site: Site | None, device: torch.device | None = None) -> Any:
        if site is not None:
            held = site.layer.read(site.module, site.tensor)
            device = next(site.module.parameters(), torch.empty(0)).device if held is None else held.device
        with drawing(self.wishes.seed, path), torch.device("meta" if self.dry else "cpu"):
            built = make()
        dtype = self.wishes.dtype
        return built.to("meta" if self.dry else device, dtype).train(
            self.model.training if site is None else site.module.training
        )


def _meant(name: str, site: Site) -> str:
    """The module of a matched site, or the one tensor that the name ends with: ``classifier.bias``."""
    parameter = f"{site.module_path}.{site.tensor}".lstrip(".")
    return parameter if f".{name}".endswith(f".{site.tensor}") else site.module_path


def _holder(model: nn.Module, site: Site) -> tuple[nn.Module, str]:
    """The module beside which the site's operators live, and the name they get there."""
    parts = site.module_path.split(".") if site.module_path else []
    depth = max(len(parts) - 1, 0)
    above = [model]
    for part in parts[:depth]:
        above.append(above[-1]._modules[part])  # type: ignore[arg-type]
    while depth > 0 and isinstance(above[depth], CONTAINERS):
        depth -= 1
    holder = above[depth]
    if isinstance(holder, CONTAINERS):
        holder, depth = (
            site.module,
            len(parts),
        )  # containers all the way up: there is no better place than the site itself
    if isinstance(holder, CONTAINERS):
        raise UnsupportedHost(f"{site.path or 'the host'} is a container; apply to a module that holds it")
    inside = site.path[len(".".join(parts[:depth])) :].lstrip(".")
    key = inside.replace(".", "__").replace(":", "__") or "self"
    return holder, f"{key}_" if key in dir(nn.Module) else key


def _put(holder: nn.Module, key: str, name: str, operator: nn.Module) -> None:
    for child in (HOLDER, key):
        taken = child in holder.__dict__ or child in holder._parameters or child in dir(type(holder))
        if child not in holder._modules and taken:
            raise UnsupportedHost(f"{type(holder).__name__} has an attribute {child!r} of its own")
        if child not in holder._modules:
            holder._modules[child] = Operators().train(holder.training)
        inner = holder._modules[child]
        if not isinstance(inner, Operators):
            raise UnsupportedHost(f"{type(holder).__name__} has a module {child!r} of its own")
        holder = inner
    if name in holder._modules:
        raise UnsupportedHost(f"two sites would keep their operators under {key!r}; rename one of the modules")
    holder._modules[name] = operator


def _remove(holder: nn.Module, key: str, name: str) -> None:
    operators = holder._modules.get(HOLDER)
    if operators is None or (site := operators._modules.get(key)) is None:
        return
    site._modules.pop(name, None)
    if not site._modules:
        del operators._modules[key]
    if not operators._modules:
        del holder._modules[HOLDER]


def _shelves(surgeon: Surgeon) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for graft in surgeon.grafts:
        yield *_holder(surgeon.model, graft.site), graft.operator
    if surgeon.owned:
        root = surgeon.model if not isinstance(surgeon.model, CONTAINERS) else surgeon.grafts[0].site.module
        for key, shared in surgeon.owned.items():
            yield root, f"shared__{key}", shared.module


def install(surgeon: Surgeon, state: HostState, name: str) -> None:
    """Put everything recorded into the host; on any error the host is left as it was."""
    try:
        for holder, key, operator in _shelves(surgeon):
            _put(holder, key, name, operator)
        for graft in surgeon.grafts:
            for site in graft.holders:
                _check_reachable(site)
                mount = Mount(name, graft.operator, site.form, site.tensor, site.layer, site.rows)
                attach(site.module, state).mounts.append(mount)
        _hold_stances(surgeon, state, name)
    except BaseException:
        uninstall(surgeon, name)
        raise


def _check_reachable(site: Site) -> None:
    if "forward" in site.module.__dict__:
        raise UnsupportedSite(
            f"{site.path}: its forward was set on the instance (accelerate hooks, patches) and would go around the "
            "adapter; apply peftcore first, then dispatch or patch the model"
        )


def _hold_stances(surgeon: Surgeon, state: HostState, name: str) -> None:
    acting = {id(site.module) for graft in surgeon.grafts for site in graft.holders}
    for module in surgeon.resolver.modules.values():
        stance = stance_of(module)
        if stance is None:
            continue
        always, attributes = stance
        if not always and not any(id(inner) in acting for inner in module.modules()):
            continue
        owner = None if always else name
        slot = attach(module, state)
        if all(held[0] != owner for held in slot.stances):
            slot.stances.append((owner, attributes))


def uninstall(surgeon: Surgeon, name: str) -> None:
    """Take out what `install` put in under `name`."""
    for holder, key, _ in _shelves(surgeon):
        _remove(holder, key, name)
    for module in surgeon.resolver.modules.values():
        detach(module, name)


def release(model: nn.Module) -> None:
    """After the last injection: give every module its own class back."""
    for module in model.modules():
        if slot_of(module) is not None:
            ungraft(module)
