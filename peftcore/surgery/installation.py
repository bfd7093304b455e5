"""Installs the operators that a surgeon recorded, all or none, and removes them again. Afterwards the host is bitwise
the same as before.

Operators are registered in adapter modules, which are children of the changed module's parent:
``self_attn.peft.q_proj.<injection>``. So the changed module is still without submodules, unless all modules around it
are containers. Code that relies on this keeps working: containers that iterate over children, layerwise casting,
parallel plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from peftcore.errors import UnsupportedHost, UnsupportedSite
from peftcore.forward.class_swap import attach, detach, is_reached, ungraft
from peftcore.forward.state.host_state import HostState
from peftcore.forward.state.slot import slot_of
from peftcore.forward.tensors.mount import Mount
from peftcore.layers.adapter_modules import ADAPTER_MODULES, AdapterModules
from peftcore.registry.plugins import layer_of
from peftcore.surgery.forced_attributes import forced_attributes_of
from peftcore.targets.sites import Site
from peftcore.utils.journal import Journal

if TYPE_CHECKING:
    from peftcore.contract.surgeon_protocol import Surgeon

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Container modules: other code iterates over their children, so operators are not registered in them."""


def _no_container(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Returns the module at a path, or its nearest parent that is not a container, and the path of the result."""
    found = model, ""
    module, parts = model, path.split(".") if path else []
    for depth, part in enumerate(parts, 1):
        module = module._modules[part]  # type: ignore[assignment]
        if not isinstance(module, CONTAINERS):
            found = module, ".".join(parts[:depth])
    return found


def _key(site: Site, path: str) -> str:
    """Returns the name of a site's adapter modules in their parent module, which is at `path`."""
    inside = site.path[len(path) :].lstrip(".")
    key = inside.replace(".", "__").replace(":", "__") or "self"
    return f"{key}_" if _has(nn.Module, key) else key


def _has(cls: type, name: str) -> bool:
    """Whether instances of a class have an attribute of this name from the class."""
    return any(name in vars(each) for each in cls.__mro__)


def _put(journal: Journal, holder: nn.Module, key: str, name: str, operator: nn.Module) -> None:
    for child in (ADAPTER_MODULES, key):
        if child not in holder._modules:
            if child in holder.__dict__ or child in holder._parameters or _has(type(holder), child):
                raise UnsupportedHost(
                    f"{type(holder).__name__} already has an attribute {child!r}, which adapters need: rename it"
                )
            made = AdapterModules()
            made.training = holder.training
            journal.put(holder, "_modules", child, made)
        inner = holder._modules[child]
        if not isinstance(inner, AdapterModules):
            raise UnsupportedHost(
                f"{type(holder).__name__} already has a module {child!r}, which adapters need: rename it"
            )
        holder = inner
    if name in holder._modules:
        raise UnsupportedHost(f"two sites would keep their operators under {key!r}; rename one of the modules")
    journal.put(holder, "_modules", name, operator)


def _remove(journal: Journal, holder: nn.Module, key: str, name: str) -> None:
    operators = holder._modules.get(ADAPTER_MODULES)
    if not isinstance(operators, AdapterModules):
        return
    if (site := operators._modules.get(key)) is not None:
        journal.drop(site, "_modules", name)
        if not site._modules:
            journal.drop(operators, "_modules", key)
    if not operators._modules:
        journal.drop(holder, "_modules", ADAPTER_MODULES)


def shelves(surgeon: Surgeon) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yields three items for each recorded operator: the module in which it will be registered, its name there, and the
    operator."""
    places: dict[str, tuple[nn.Module, str]] = {}
    for graft in surgeon.grafts:
        site = graft.site
        above = site.module_path.rpartition(".")[0]
        if above not in places:
            places[above] = _no_container(surgeon.model, above)
        holder, path = places[above]
        if isinstance(holder, CONTAINERS):
            holder, path = site.module, site.module_path  # containers all the way up: there is no better place
        if isinstance(holder, CONTAINERS):
            raise UnsupportedHost(f"{site.path or 'the host'} is a container; apply to a module that holds it")
        yield holder, _key(site, path) + graft.part.replace("/", "_part"), graft.operator
    if surgeon.owned:
        root = surgeon.model if not isinstance(surgeon.model, CONTAINERS) else surgeon.grafts[0].site.module
        for key, shared in surgeon.owned.items():
            yield root, f"shared__{key.replace('/', '__')}", shared.module


def install(journal: Journal, surgeon: Surgeon, state: HostState, name: str) -> None:
    """Install all recorded operators in the host."""
    _check_trains(surgeon)
    for holder, key, operator in shelves(surgeon):
        _put(journal, holder, key, name, operator)
    for graft in surgeon.grafts:
        for site in graft.holders:
            _check_reachable(site)
            mount = Mount(name, graft.operator, site.form, site.tensor, site.layer, site.slices)
            slot = attach(journal, site.module, state)
            slot.path = slot.path or site.module_path
            journal.put(slot, "mounts", name, [*slot.mounts.get(name, ()), mount])
    _force_attributes(journal, surgeon, state, name)


def _check_trains(surgeon: Surgeon) -> None:
    """If quantized modules are adapted, check that gradients flow through every quantized module, since there may be
    adapted modules before it."""
    if any(site.layer.packed for graft in surgeon.grafts for site in graft.holders):
        for module in surgeon.resolver.modules.values():
            layer_of(module, "weight").check_trains(module)


def _check_reachable(site: Site) -> None:
    if not is_reached(site.module):
        raise UnsupportedSite(
            f"{site.path}: its forward was set on the instance and would bypass the adapter; apply peftcore first, "
            "then patch the model"
        )
    if "forward" in site.module.__dict__ and any(p.is_meta for p in site.module.parameters()):
        raise UnsupportedSite(
            f"{site.path}: its weights are offloaded, so an adapter cannot start from them; apply peftcore first, then "
            "offload the model"
        )


def _force_attributes(journal: Journal, surgeon: Surgeon, state: HostState, name: str) -> None:
    found = list(forced_attributes_of(surgeon.resolver.modules.values()))
    acting = {id(site.module) for graft in surgeon.grafts for site in graft.holders} if found else ()
    for module, forced in found:
        if not forced.always and not any(id(inner) in acting for inner in module.modules()):
            continue
        forced.ready(module)
        owner = None if forced.always else name
        slot = attach(journal, module, state)
        if all(held[0] != owner for held in slot.forced_attributes):
            journal.set(slot, "forced_attributes", [*slot.forced_attributes, (owner, forced.attributes)])


def uninstall(journal: Journal, surgeon: Surgeon, state: HostState, name: str) -> None:
    """Remove the operators that `install` put in under `name`."""
    for holder, key, _ in shelves(surgeon):
        _remove(journal, holder, key, name)
    for module in surgeon.resolver.modules.values():
        detach(journal, module, state, name)
    journal.set(state, "slots", {slot: None for slot in state.slots if slot.mounts or slot.forced_attributes})


def release(journal: Journal, model: nn.Module, state: HostState) -> None:
    """Restore the original class of every module of this host, after the last injection was removed. If an adapted
    model is a part of the host, its modules do not change."""
    for module in model.modules():
        if (slot := slot_of(module)) is not None and slot.state is state:
            ungraft(journal, module)
    journal.set(state, "slots", {})
