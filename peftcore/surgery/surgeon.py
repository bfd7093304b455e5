"""The surgeon: the object that a method's `inject` receives. Its methods record operators.

They do not change the host. `peftcore.surgery.installation` installs the recorded operators afterwards. `plan` records
in the same way, with operators on the meta device, and installs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from peftcore.contract.config import MethodConfig, matches
from peftcore.contract.method import Method
from peftcore.contract.operators import Operator, Replacement, Shared, WeightOperator, is_mergeable, tables
from peftcore.contract.surgeon_protocol import Graft, O, Surgeon, Wishes
from peftcore.errors import (
    CheckpointError,
    CompositionError,
    HostMismatch,
    PluginError,
    TargetError,
    UnsupportedHost,
    UnsupportedSite,
)
from peftcore.forward.attention.attention_calls import locate_attention
from peftcore.forward.sequence.sequence_inside import InnerRows, InnerSite, Unseen, count_blocks, inside
from peftcore.layers.layer import Slices, overlap
from peftcore.registry.plugins import registry
from peftcore.surgery import parallel_models
from peftcore.surgery.adapted_models import check_apart
from peftcore.surgery.defaults import default_sites, notices
from peftcore.surgery.seeding import one_dtype, preserved_rng, seed_by_path
from peftcore.surgery.table_rows import RowsSite, TableRows
from peftcore.targets.attention_sites import AttentionSite
from peftcore.targets.resolver import Resolver, Target
from peftcore.targets.sequence_sites import SequenceSite, locate_stack
from peftcore.targets.sites import Site
from peftcore.utils.progress import Progress


@dataclass
class RecordingSurgeon(Surgeon):
    """Records the operators of a method for a host. The host does not change.

    Attributes:
        ties: by key of an operator, the other parameters that share the tensor of its site. Only for tensors that
            several modules contain.
    """

    model: nn.Module
    method: Method
    config: MethodConfig
    resolver: Resolver
    wishes: Wishes
    dry: bool = False
    part: str = ""
    parts: dict[str, RecordingSurgeon] = field(default_factory=dict)
    grafts: list[Graft] = field(default_factory=list)
    owned: dict[str, Shared] = field(default_factory=dict)
    selections: dict[str, list[Site]] = field(default_factory=dict)
    progress: Progress = field(default_factory=lambda: Progress("building operators"))
    """The progress bar, which advances with each operator: decomposing many weights takes time."""
    _by_method: bool = True
    _paths: set[str] = field(default_factory=set)
    _replaced: dict[tuple[str | int, Slices | None, str], Replacement] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def record(self) -> None:
        """Let the method record its operators. Also record the rows of token tables in a file, and the modules that the
        user trains in full. The host does not change.

        Raises:
            TargetError: no site matches.
            UnsupportedHost: the shapes of some layers are not known; a module already has operators of another adapted
                model; or an operator would receive only pieces of tensors in a tensor-parallel model.
        """
        method, config = self.method, self.config
        parameters = self.resolver.parameters()
        _check_shapes(parameters)
        parallel = parallel_models.computes_with_pieces(self.model, parameters)
        try:
            with preserved_rng(), parallel_models.explaining(method.name) if parallel else contextlib.nullcontext():
                self.table_rows()
                registry().hook.peftcore_inject(model=self.model, method=method, config=config, surgeon=self)
                self.train_wishes()
        finally:
            self.progress.close()
        self.note_ties()
        check_apart(self)
        if parallel:
            parallel_models.check_operators(self)
            if not self.dry:
                parallel_models.start_alike(self)
        if not self.grafts:
            raise TargetError(
                f"{method.name} found nothing to act on in this {type(self.model).__name__}; its target is "
                f"{self.wishes.target or method.target!r}. Pass another target="
            )

    def idle_overrides(self) -> list[str]:
        """Returns the entries of the config's `overrides` that match no site."""
        if not self.config.overrides:
            return []
        paths = {graft.site.path for graft in self.grafts}
        paths |= {site.path for selection in self.selections.values() for site in selection}
        return [each for each in self.config.overrides if not any(matches(path, each) for path in paths)]

    def sites(self, target: Target | None = None, *, optional: bool = False) -> list[Site]:
        key = "" if target is None else str(target)
        saved = self.wishes.saved
        try:
            if saved is not None and key in saved:
                found = [self.resolver.recorded(**record) for record in saved[key]]
                if len({site.path for site in found}) < len(found):
                    raise CheckpointError(
                        f"the file lists a site of {self.method.name} twice, so it is damaged: load another copy"
                    )
            elif saved is not None and target is None and self.wishes.target is not None:
                raise CheckpointError(
                    f"the file lists no sites of {self.method.name}, so it is incomplete: load another copy"
                )
            elif target is None and self.wishes.target is not None:
                found = self.resolver.sites(self.wishes.target, exclude=self.wishes.exclude)
            else:
                found = self._defaults(target)
        except TargetError:
            if not optional:
                raise
            found = []
        if not key and saved is None and self.wishes.exclude is not None:
            self.notices += [self.resolver.nothing("exclude", each) for each in self.resolver.idle(self.wishes.exclude)]
        found = [site for site in found if site.path not in self.wishes.left_out]
        self.selections[key] = found
        self.progress.expect(0 if self.dry else len(found))
        return [replace(site, meta=True) for site in found] if self.dry else found

    def chosen(self, sites: Sequence[Site]) -> list[Site]:
        wishes, saved = self.wishes, self.wishes.saved
        if saved is not None:
            wanted = {record["module_path"] for record in saved.get("", ())}
        else:
            target: Target = [_exactly(site.module_path) for site in sites] if wishes.target is None else wishes.target
            wanted = {site.module_path for site in self.resolver.sites(target, exclude=wishes.exclude)}
        found = [site for site in sites if site.module_path in wanted]
        self.selections[""] = found
        return found

    def graft(
        self,
        site: Site,
        operator: Callable[..., O],
        config: MethodConfig | None = None,
        holders: tuple[Site, ...] = (),
        **own: Any,
    ) -> O:
        if (path := site.path) in self._paths:
            raise PluginError(f"{self.method.name} grafts {path} twice: graft one operator at each site")
        options = (config.at(path),) if config else ()
        built: O = self._build(path, lambda: operator(site, *options, **own), site)
        if isinstance(built, Operator) and site.form == "weight" and not is_mergeable(built):
            if site.layer.in_pieces:
                raise UnsupportedSite(
                    f"{self.method.name} acts on a module's activations, but {site.path} is tensor-parallel and "
                    "computes pieces; use a method that acts on weights, such as lora or dora, or adapt the whole "
                    "model, merge, then parallelize"
                )
            raise UnsupportedSite(
                f"{self.method.name} acts on a module's activations, but {site.path} is a tensor that is read, not "
                "called; target the module that uses it, such as the role attn.output"
            )
        if isinstance(built, WeightOperator):
            site = replace(site, form="weight")
        for each in (site, *holders):
            if each.form == "weight":
                each.layer.check_readable(each.module, each.tensor)
        self._record(Graft(site, built, (site, *holders), self._by_method, self.part))
        return built

    def attention_site(self, site: Site) -> AttentionSite:
        return locate_attention(site, self.resolver)

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
        found = self.sequence_site(site)
        if blocks:
            return self._inside(inside(found, self.resolver, blocks, counted), operator, config, own)
        found = found.behind_embeddings() if behind else found
        return self.graft(found, operator, config, found.places, **own)

    def _inside(
        self, site: InnerSite, operator: Callable[..., O], config: MethodConfig | None, own: Mapping[str, Any]
    ) -> O:
        built = self.graft(site, operator, config, site.places, **own)
        if not isinstance(built, InnerRows):
            raise PluginError(
                f"{type(built).__name__} is not a subclass of InnerRows, so it cannot make rows at blocks"
            )
        for attention, depth in site.hiding:
            self.graft(attention, Unseen, depth=depth, standing=built.standing)
        return built

    def blocks_of(self, site: Site) -> int:
        return count_blocks(self.sequence_site(site), self.resolver)

    def sequence_site(self, site: Site) -> SequenceSite:
        return locate_stack(site, self.resolver)

    def include(self, part: str, method: Method, config: MethodConfig, target: Target | None = None) -> None:
        grafts = self.collect(part, method, config, target)
        if self.wishes.saved is None:  # a file goes on doing what it did
            self._refuse_overridden(grafts)
        self.grafts += grafts
        self._paths |= self.parts[part]._paths

    def collect(self, part: str, method: Method, config: MethodConfig, target: Target | None = None) -> list[Graft]:
        prefix, wishes = f"{part}/", self.wishes
        saved = wishes.saved
        if saved is not None:
            saved = {key.removeprefix(prefix): sites for key, sites in saved.items() if key.startswith(prefix)}
        wishes = replace(wishes, target=wishes.target if target is None else target, train=(), rows={}, saved=saved)
        child = RecordingSurgeon(
            self.model, method, config, self.resolver, wishes, self.dry, self.part + prefix, progress=self.progress
        )
        registry().hook.peftcore_inject(model=self.model, method=method, config=config, surgeon=child)
        self.parts[part] = child
        self.notices += child.notices
        self.owned |= {prefix + name: shared for name, shared in child.owned.items()}
        self.selections |= {prefix + key: sites for key, sites in child.selections.items()}
        return child.grafts

    def own(self, name: str, module: Callable[[], nn.Module]) -> Shared:
        if name not in self.owned:
            anywhere = next(self.model.parameters(), torch.empty(0)).device
            with preserved_rng():  # an operator that is being built may ask for it
                self.owned[name] = Shared(self._build(f"shared:{name}", module, None, anywhere))
        return self.owned[name]

    def replace(self, site: Site) -> Replacement:
        tensor = None if site.layer.packed else site.layer.held(site.module, site.tensor)
        key = (site.path if tensor is None else id(tensor), site.slices, self._untied(site))
        if key not in self._replaced:
            site = self._as_stored(site)
            self._replaced[key] = self._build(site.path, lambda: Replacement(site), site)
            holders = tuple(self._tied(site, tensor))
            self._record(Graft(site, self._replaced[key], holders, self._by_method, self.part))
        return self._replaced[key]

    def train(self, path: str) -> list[Replacement]:
        resolver = self.resolver
        if path not in resolver.modules:
            return [self.replace(resolver.module_site(path))]
        inside = [p for p in resolver.modules if p == path or p.startswith(f"{path}.") or not path]
        sites = [
            resolver.site(p, name)
            for p in inside
            for name in resolver.layer_of(resolver.modules[p], "weight").slots(resolver.modules[p])
        ]
        sites = [site for site in sites if not site.missing(site.tensor)]
        return [self.replace(replace(site, meta=self.dry)) for site in sites]

    def note_ties(self) -> None:
        """Find the operators that act on a tensor of several modules, and set `ties`."""
        for graft in self.grafts:
            own = graft.site.module._parameters.get(graft.site.tensor)
            if own is not None and graft.holders[1:]:
                held = {f"{path}.{name}".lstrip(".") for path, name in self.resolver.holders(own)}
                acts = {f"{each.module_path}.{each.tensor}".lstrip(".") for each in graft.holders}
                if others := (held & acts) - {f"{graft.site.module_path}.{graft.site.tensor}".lstrip(".")}:
                    self.ties[graft.key] = tuple(sorted(others))

    def with_parts(self) -> Iterator[RecordingSurgeon]:
        """Yields this surgeon, and those of the parts of a hybrid, in their order."""
        yield self
        for part in self.parts.values():
            yield from part.with_parts()

    def stored_anew(self, module: nn.Module) -> None:
        """Update the layers of the recorded sites of a module that was quantized or made dense after the recording."""

        def anew(site: Site) -> Site:
            return replace(site, layer=site.layer_of(module, site.tensor)) if site.module is module else site

        self.grafts[:] = [
            replace(graft, site=anew(graft.site), holders=tuple(map(anew, graft.holders))) for graft in self.grafts
        ]
        self.selections |= {key: [anew(site) for site in sites] for key, sites in self.selections.items()}
        for part in self.parts.values():
            part.stored_anew(module)

    def table_rows(self) -> None:
        """Record the rows of token tables that a file contains. All other operators are applied after these rows.

        Raises:
            HostMismatch: the host lacks the table, or its table has another length.
            UnsupportedSite: a table cannot be read.
        """
        for path, (start, stop) in self.wishes.rows.items():
            module = self.resolver.modules.get(path)
            weight = None if module is None else module._parameters.get("weight")
            if weight is None or weight.dim() != 2:
                raise HostMismatch(
                    f"the adapter contains rows of the token table {path!r}, which this model lacks: load it onto the "
                    "base model it was trained on"
                )
            if len(weight) != stop or start >= stop:
                raise HostMismatch(
                    f"{path} has {len(weight)} rows here but had {stop} when the adapter was trained, which stores "
                    f"{stop - start} of them: call model.resize_token_embeddings({stop}) first"
                )
            site = replace(self.resolver.site(path, "weight"), meta=self.dry)
            rows = RowsSite.of(site)
            built = self._build(rows.path, lambda: TableRows(rows, site.layer, start), rows)  # noqa: B023
            self._record(Graft(rows, built, (rows,), False, self.part, adds_rows=True))

    def train_wishes(self) -> None:
        """Record the modules and parameters that the user named in ``train``: paths, or ends of paths.

        Raises:
            TargetError: a name matches nothing, or nothing that has parameters.
            HostMismatch: a file names a module that the host lacks.
        """
        self._by_method = False
        for name in self.wishes.train:
            exact = name in self.resolver.modules or self.resolver.has_parameter(name)
            if not exact and self.wishes.saved is not None:
                raise HostMismatch(
                    f"the adapter contains trained values of {name!r}, which this model lacks: load it onto the base "
                    "model it was trained on"
                )
            paths = [name] if exact else [_meant(name, site) for site in self.resolver.sites(name)]
            if not [each for path in paths for each in self.train(path)]:
                raise TargetError(f"train: {name!r} has no parameters; name a module or tensor that has some")
        self._by_method = True

    def _record(self, graft: Graft) -> None:
        if (path := graft.site.path) in self._paths:
            raise UnsupportedSite(
                f"{path} would be both adapted and trained itself; exclude it from the target, or remove it from train="
            )
        self.progress.step()
        self.grafts.append(graft)
        self._paths.add(path)

    def _refuse_overridden(self, grafts: Sequence[Graft]) -> None:
        """Raise CompositionError if an operator of a new part would override the effect of an operator of an earlier
        part."""
        earlier: dict[tuple[str, str], list[tuple[Graft, Site]]] = {}
        for graft in self.grafts:
            for site in graft.holders if is_mergeable(graft.operator) else ():
                earlier.setdefault((site.module_path, site.tensor), []).append((graft, site))
        for new in grafts:
            for site in new.holders if new.operator.overrides else ():
                for graft, other in earlier.get((site.module_path, site.tensor), ()):
                    if overlap(site.slices, other.slices):
                        first, second = self._name_of(graft), self._name_of(new)
                        raise CompositionError(
                            f"{first} and {second} both act on {site.path}, and {second}, which is applied later, "
                            f"replaces its value, so the effect of {first} would be lost. Give one of them a target= "
                            "without this site, or change their order"
                        )

    def _name_of(self, graft: Graft) -> str:
        part = graft.part.removeprefix(self.part).partition("/")[0]
        return f"part {part} ({self.parts[part].method.name})" if part in self.parts else self.method.name

    def _defaults(self, target: Target | None) -> list[Site]:
        """Returns the sites of `target`, a role that the method passes; or those of the method's default targets if it
        is None."""
        # The targets in a file are for people to read: their patterns are matched nowhere.
        exclude = self.wishes.exclude if self.wishes.saved is None else None
        targets = (self.method.target, *self.method.alternatives) if target is None else (target,)
        taken = default_sites(self.resolver, targets, exclude)
        if target is None and self.method.alternatives:
            self.notices += notices(self.method, taken, self.resolver)
        return taken.sites

    def _tied(self, site: Site, tensor: Tensor | None) -> Iterator[Site]:
        yield site
        if isinstance(tensor, nn.Parameter) and site.slices is None:
            for path, name in self.resolver.holders(tensor):
                holder = self.resolver.site(path, name)
                itself = (holder.module_path, holder.tensor) == (site.module_path, site.tensor)
                if not itself and self._untied(holder) == self._untied(site):
                    yield self._as_stored(holder)

    def _untied(self, site: Site) -> str:
        """Returns the path of the module in `wishes.untied` that contains a site; "" if there is none. Tied tensors in
        such a module get separate values."""
        path = f"{site.module_path}.{site.tensor}"
        return next((unit for unit in self.wishes.untied if path.startswith(f"{unit}.")), "")

    @staticmethod
    def _as_stored(site: Site) -> Site:
        """Returns the site of a whole tensor with the layout in which it is stored. So modules of different kinds
        (table, head) can share one value."""
        return replace(site, form="weight", layer=site.layer if site.slices else site.layer.as_stored)

    def _build(self, path: str, make: Callable[[], Any], site: Site | None, device: torch.device | None = None) -> Any:
        if site is not None:
            device = site.device
        where, on_it = self._where
        seed_by_path(self.wishes.seed, self.part + path)
        with on_it, one_dtype():
            built = make()
        goal = where if self.dry else device
        if not self.dry and device is not None and device.type == "meta":
            goal = None  # a host without values: its operators have some
        built = self._moved(built, where, goal)
        training = self.model.training if site is None else site.module.training
        if built._modules:
            return built.train(training)
        if built.training is not training:
            built.training = training  # as `train` does, after a search for more below
        return built

    @cached_property
    def _where(self) -> tuple[torch.device, AbstractContextManager[Any]]:
        """The device on which operators are built, and a context manager that makes torch use this device."""
        where = torch.device("meta" if self.dry else "cpu")
        # A device that is the default already needs no mode, which would intercept each call of torch.
        return where, contextlib.nullcontext() if torch.get_default_device() == where else where

    def _moved(self, built: nn.Module, where: torch.device, goal: torch.device | None) -> nn.Module:
        """Returns an operator on the device `goal` and in the requested dtype. Most operators are there already."""
        dtype = self.wishes.dtype
        parameters, buffers = tables(built)
        there = (goal is None or goal == where) and not built._modules and not buffers
        for parameter in parameters.values():
            there = there and (parameter is None or parameter.dtype is dtype)
        return built if there else built.to(goal, dtype)


def _check_shapes(parameters: Collection[nn.Parameter]) -> None:
    if any(map(is_lazy, parameters)):
        raise UnsupportedHost("some layers are lazy and have no shapes yet: run the host once, then adapt it")
    if any(each.shape == (0,) for each in parameters):
        raise UnsupportedHost(
            "some weights have shape [0], because they are sharded or stored elsewhere. Restore the whole model, apply "
            "the adapter, then shard it"
        )


def _exactly(path: str) -> Callable[[str, nn.Module], bool]:
    return lambda found, module: found == path


def _meant(name: str, site: Site) -> str:
    """Returns the path of a matched module. If the name ends with a tensor, such as ``classifier.bias``, returns the
    path of this tensor."""
    parameter = f"{site.module_path}.{site.tensor}".lstrip(".")
    return parameter if f".{name}".endswith(f".{site.tensor}") else site.module_path
