"""Records what a method installs in a model: which operators at which modules. The model stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from peftcore.contract.config import MethodConfig, matches
from peftcore.contract.method import Method
from peftcore.errors import TargetError, UnsupportedHost
from peftcore.injection import freezing
from peftcore.injection.applied import Planned, choose_trained
from peftcore.injection.arguments import host_map
from peftcore.layers.pieces import is_in_engine
from peftcore.registry.plugins import layer_of, registry
from peftcore.roles import HostMap
from peftcore.surgery import parallel_models
from peftcore.surgery.adapted_models import check_apart
from peftcore.surgery.planning import Plan
from peftcore.surgery.seeding import preserved_rng
from peftcore.surgery.surgeon import Surgeon, Wishes
from peftcore.targets.resolver import Resolver


def prepare(
    model: nn.Module, method: Method, config: MethodConfig, wishes: Wishes, host: HostMap | None, dry: bool
) -> Surgeon:
    """Returns a surgeon with the operators of the method recorded; nothing is changed.

    Raises:
        UnsupportedHost: a wrapper that hides its module, TorchScript, or layers without shapes.
        TargetError: nothing to act on.
    """
    _check_adaptable(model)
    for changes in config.overrides.values():
        config.replace(**{**changes, "overrides": {}})  # wrong options are errors, also where no site matches
    resolver = Resolver(model, host or host_map(model), layer_of)
    parameters = resolver.parameters()
    _check_shapes(parameters)
    parallel = parallel_models.computes_with_pieces(model, parameters)
    surgeon = Surgeon(model, method, config, resolver, wishes, dry=dry, thawed=freezing.thawed(parameters))
    try:
        with preserved_rng(), parallel_models.explaining(method.name) if parallel else nullcontext():
            surgeon.table_rows()
            registry().hook.peftcore_inject(model=model, method=method, config=config, surgeon=surgeon)
            surgeon.train_wishes()
    finally:
        surgeon.progress.close()
    surgeon.note_ties()
    check_apart(surgeon)
    if parallel:
        parallel_models.check_operators(surgeon)
        if not dry:
            parallel_models.start_alike(surgeon)
    if not surgeon.grafts:
        raise TargetError(
            f"{method.name} found nothing to act on in this {type(model).__name__}; "
            f"its target is {wishes.target or method.target!r}"
        )
    if idle := _idle(config, surgeon):
        warnings.warn(f"these overrides match no site and are passed over: {idle}", UserWarning, stacklevel=3)
    return surgeon


def plan_of(surgeon: Surgeon, shards: int | None = None) -> Plan:
    """Returns the plan of a dry run, for which the method chooses what would train."""
    choose_trained(Planned(surgeon))
    return Plan.of(surgeon, shards)


def _check_adaptable(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel):
        raise UnsupportedHost(
            "DataParallel copies modules in every forward; use DistributedDataParallel, and apply to the module inside"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedHost("TorchScript modules cannot change; apply before scripting, merge, then script")
    if is_in_engine(model):
        raise UnsupportedHost(
            "DeepSpeed's engine (ZeRO-3) has the model already, and would not train what comes now: apply before "
            "deepspeed.initialize"
        )


def _check_shapes(parameters: Collection[nn.Parameter]) -> None:
    if any(map(is_lazy, parameters)):
        raise UnsupportedHost("some layers are lazy and have no shapes yet: run the host once, then adapt it")
    if any(each.shape == (0,) for each in parameters):
        raise UnsupportedHost(
            "some weights are empty: somebody has cut them apart, or keeps them elsewhere. Make the model whole, "
            "apply, and cut it then"
        )


def _idle(config: MethodConfig, surgeon: Surgeon) -> list[str]:
    """Returns the overrides that match no site."""
    if not config.overrides:
        return []
    paths = {graft.site.path for graft in surgeon.grafts}
    paths |= {site.path for selection in surgeon.selections.values() for site in selection}
    return [each for each in config.overrides if not any(matches(path, each) for path in paths)]
