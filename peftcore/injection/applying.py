"""`apply` and `plan`: resolve a method, record its operators, and install them or return the plan."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from peftcore.contract.config import MethodConfig, dtype_of, matches
from peftcore.contract.method import Method
from peftcore.contract.operators import changes_bias
from peftcore.contract.peft_names import is_peft_config
from peftcore.errors import (
    CalibrationError,
    CompositionError,
    ConfigError,
    DuplicateInjection,
    TargetError,
    UnsupportedHost,
)
from peftcore.forward.active_adapters import Active, Choice
from peftcore.forward.adapter_modules import AdapterModules
from peftcore.forward.host_state import HostState, drop_state, ensure_state, state_of
from peftcore.injection import freezing, made_of_base
from peftcore.injection.injection import Injection
from peftcore.layers.pieces import at_hand, is_in_engine
from peftcore.layers.tensor_parallel import ParallelLinear, agree
from peftcore.registry.catalogue import method as find_method
from peftcore.registry.experimental import notice_experimental
from peftcore.registry.plugins import imported, layer_of, registry
from peftcore.registry.presets import method_of, preset_of
from peftcore.roles import HostMap
from peftcore.surgery import silent_layers
from peftcore.surgery.adapted_models import check_apart
from peftcore.surgery.installation import install, release, uninstall
from peftcore.surgery.placement import Placement
from peftcore.surgery.planning import Plan
from peftcore.surgery.seeding import preserved_rng
from peftcore.surgery.surgeon import Surgeon, Wishes
from peftcore.targets.resolver import Resolver, Target, names_a_role
from peftcore.training.batches import Data, calibrate, find_structure
from peftcore.utils.notices import notice

PIECES = (
    "the model is tensor-parallel: target linear layers that are cut (such as attn.q, attn.v) with a method that acts "
    "on weights, such as lora or dora; or adapt the whole model, merge, then parallelize"
)
"""What is said of a model that computes with pieces of its weights."""
OF_PEFT = "peftcore.files.peft_configs:apply_peft_config"
"""The function that applies a configuration of peft; named, not imported, since it is in a layer above."""
Part = str | MethodConfig | Mapping[str, Any]
"""One method of a hybrid: a name, a config object, or the options as a mapping with the name under "method" (and, where
the part has its own, a "target")."""


def resolve_method(
    method: str | MethodConfig | type[Method] | Sequence[Part], options: Mapping[str, Any]
) -> tuple[Method, MethodConfig]:
    """Returns the method and its checked options, from a name, a config object, a method class, or a list of parts."""
    if isinstance(method, Sequence) and not isinstance(method, str):
        return resolve_method("config_union", {"parts": [_spelled(part) for part in method], **options})
    if isinstance(method, MethodConfig):
        return find_method(method.method)(), method.replace(**options) if options else method
    if is_peft_config(method):
        raise ConfigError(
            f"a {type(method).__name__} of peft can be applied, and nothing else: peftcore.apply(model, it)"
        )
    cls = find_method(method) if isinstance(method, str) else method
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(
            f'{type(method).__name__} is no method: name one, peftcore.apply(model, "lora", rank=8), or give a config, '
            "or a list of methods. Files of peft are read by peftcore.load(model, folder)"
        )
    return method_of(cls, options)


def with_preset(
    method: object, model: nn.Module, target: Target | None, train: Iterable[str], host: HostMap | None
) -> tuple[Target | None, tuple[str, ...], HostMap | None, str | None]:
    """Returns `target`, `train` and `host` as `apply` has them, with those of the preset that a name may be, and the
    preset's name. Roles of a preset that the host lacks are passed over, as of default targets."""
    cls = find_method(method) if isinstance(method, str) else None
    preset = None if cls is None else preset_of(cls)
    train = (train,) if isinstance(train, str) else tuple(train)
    if cls is None or preset is None:
        return target, train, host, None
    if target is None and preset.target is not None:
        host = host or host_map(model)
        targets = [preset.target] if isinstance(preset.target, str) else [*preset.target]
        target = [each for each in targets if host.knows(each) or not names_a_role(each)] or targets
    return target, (*preset.train, *train), host, cls.name


def check_model(model: object) -> None:
    """Check that what is to be adapted is a module.

    Raises:
        UnsupportedHost: it is something else, such as a pipeline; the modules that it has are named.
    """
    if not isinstance(model, nn.Module):
        held = vars(model) if isinstance(getattr(model, "__dict__", None), dict) else {}
        inside = [f".{name}" for name, value in held.items() if isinstance(value, nn.Module)]
        hint = f"; it has {', '.join(inside)}: adapt one of these" if inside else ""
        raise UnsupportedHost(f"{type(model).__name__} is no nn.Module{hint}")


def _spelled(part: Part) -> dict[str, Any]:
    if isinstance(part, MethodConfig):
        return part.model_dump(mode="json")
    return {"method": part} if isinstance(part, str) else dict(part)


def host_map(model: nn.Module) -> HostMap:
    """Returns the host's map, from the first plugin that knows the host."""
    found: HostMap = registry().hook.peftcore_map(model=model)
    return found


def prepare(
    model: nn.Module, method: Method, config: MethodConfig, wishes: Wishes, host: HostMap | None, dry: bool
) -> Surgeon:
    """Record the operators of the method; nothing is changed.

    Raises:
        UnsupportedHost: a wrapper that hides its module, TorchScript, or layers without shapes.
        TargetError: nothing to act on.
    """
    if isinstance(model, nn.DataParallel):
        raise UnsupportedHost(
            "DataParallel copies modules in every forward; use DistributedDataParallel, and apply to the module inside"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedHost("TorchScript modules cannot change; apply before scripting, merge, then script")
    for changes in config.overrides.values():
        config.replace(**{**changes, "overrides": {}})  # wrong options are errors, also where no site matches
    if is_in_engine(model):
        raise UnsupportedHost(
            "DeepSpeed's engine (ZeRO-3) has the model already, and would not train what comes now: apply before "
            "deepspeed.initialize"
        )
    resolver = Resolver(model, host or host_map(model), layer_of)
    parameters = resolver.parameters()
    if any(map(is_lazy, parameters)):
        raise UnsupportedHost("some layers are lazy and have no shapes yet: run the host once, then adapt it")
    if any(each.shape == (0,) for each in parameters):
        raise UnsupportedHost(
            "some weights are empty: somebody has cut them apart, or keeps them elsewhere. Make the model whole, "
            "apply, and cut it then"
        )
    parallel = _is_distributed(parameters) and _is_tensor_parallel(model)
    surgeon = Surgeon(model, method, config, resolver, wishes, dry=dry, thawed=freezing.thawed(parameters))
    try:
        with preserved_rng():
            surgeon.table_rows()
            registry().hook.peftcore_inject(model=model, method=method, config=config, surgeon=surgeon)
            surgeon.train_wishes()
    except RuntimeError as error:
        if not parallel or "DTensor" not in str(error):
            raise
        raise UnsupportedHost(f"{PIECES}. {method.name} asked for more ({error})") from error
    finally:
        surgeon.progress.close()
    check_apart(surgeon)
    if parallel:
        _fit_pieces(surgeon, dry)
    if not surgeon.grafts:
        raise TargetError(
            f"{method.name} found nothing to act on in this {type(model).__name__}; "
            f"its target is {wishes.target or method.target!r}"
        )
    if idle := _idle(config, surgeon):
        warnings.warn(f"these overrides match no site and are passed over: {idle}", UserWarning, stacklevel=3)
    return surgeon


def _idle(config: MethodConfig, surgeon: Surgeon) -> list[str]:
    """Returns the overrides that match no site."""
    if not config.overrides:
        return []
    paths = {graft.site.path for graft in surgeon.grafts}
    paths |= {site.path for selection in surgeon.selections.values() for site in selection}
    return [each for each in config.overrides if not any(matches(path, each) for path in paths)]


def _is_distributed(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a weight is a distributed tensor. Looked up, not imported: in a process that never imported
    torch.distributed.tensor none is."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and any(issubclass(kind, tensors.DTensor) for kind in set(map(type, parameters)))


def _is_tensor_parallel(model: nn.Module) -> bool:
    """Whether weights are distributed tensors by other means than FSDP2, which gathers them before each use.

    Raises:
        UnsupportedHost: FSDP2 has cut again what tensor parallelism had cut.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if isinstance(model, FSDPModule):
        if any(isinstance(each, DTensor) and _cuts(each) > 1 for each in model.parameters()):
            raise UnsupportedHost(
                "the model is tensor-parallel and sharded (FSDP2), and what an adapter would meet in its forward are "
                "pieces: take one of them, or adapt the whole model, merge, then cut"
            )
        return False
    own = any(isinstance(parameter, DTensor) for parameter in model._parameters.values())
    children = (child for child in model._modules.values() if child is not None and not is_ours(child))
    return own or any(_is_tensor_parallel(child) for child in children)


def _cuts(tensor: Any) -> int:
    """Returns along how many dimensions of the mesh of processes a distributed tensor is cut."""
    return sum(not placement.is_replicate() for placement in tensor.placements)


def _fit_pieces(surgeon: Surgeon, dry: bool) -> None:
    """Check that operators in a tensor-parallel model act on weights alone, which are gathered for them, and let them
    start alike in all processes.

    Raises:
        UnsupportedHost: one acts on what a module is given or computes, or on another tensor, of which this process may
            have a piece.
    """
    for graft in surgeon.grafts:
        for site in graft.holders:
            if site.form != "weight" or not isinstance(site.layer, ParallelLinear):
                where = site.path or "the model"
                raise UnsupportedHost(f"{PIECES}. {surgeon.method.name} would meet pieces at {where}")
            if (site.tensor == "bias" or changes_bias(graft.operator)) and site.layer.adds_bias_late(site.module):
                raise UnsupportedHost(
                    f"the bias of {site.module_path} is added to the sum of what all processes compute, where "
                    f"{surgeon.method.name} cannot act on it: exclude it, or adapt the whole model, merge, then "
                    "parallelize"
                )
    layers = [graft.site.layer for graft in surgeon.grafts if isinstance(graft.site.layer, ParallelLinear)]
    modules = [*(shared.module for shared in surgeon.owned.values()), *(graft.operator for graft in surgeon.grafts)]
    for module in modules if layers and not dry else ():
        agree(module, layers[0])


def is_ours(module: nn.Module) -> bool:
    """Whether a module of the host belongs to an injection."""
    return isinstance(module, AdapterModules)


def wishes_of(
    target: Target | None,
    exclude: Target | None,
    train: Iterable[str],
    seed: int | None,
    dtype: torch.dtype | str | None,
) -> Wishes:
    """Returns the user's wishes; the seed is torch's own unless one is given, so that torch.manual_seed decides."""
    train = (train,) if isinstance(train, str) else tuple(train)
    return Wishes(target, exclude, train, torch.initial_seed() if seed is None else seed, dtype_of(dtype))


def apply(
    model: nn.Module,
    method: str | MethodConfig | type[Method] | Sequence[Part],
    *,
    name: str | None = None,
    target: Target | None = None,
    exclude: Target | None = None,
    train: Sequence[str] | str = (),
    data: Data | None = None,
    seed: int | None = None,
    dtype: torch.dtype | str | None = None,
    host: HostMap | None = None,
    **config: Any,
) -> Injection:
    """Adapt any module in place with a method; all of it, or nothing on an error.

    The base is frozen, the operators train, the injection is active. Other injections on the host stay as they are.
    Inside of a route or composition their rows and parts stay, too: the new one joins the stack in force outside of it.
    It is active for whom `activate` holds: applied in another thread than the first one, in that thread alone.

    Args:
        model: the host; changed in place, its class and parameter names stay.
        method: a name, ``"plugin/name"``, a config object, or a method class; a list of names, config objects or
            mappings (``{"method": "lora", "rank": 4, "target": "attn.q"}``) applies all of them as one injection. A
            configuration of peft (LoraConfig) is made by peft and read as its file is; with `name` and `seed` alone.
        name: name of the injection on this host; the method's by default. No dots.
        target: where to act, instead of the method's default roles: a role ("attn.q", "all-linear"), a glob, ends of
            paths, "re:…", a type, a predicate of (path, module), or a list of these.
        exclude: targets to leave out, in the same forms.
        train: modules of the host (heads, norms) that train along, as replacements saved with the adapter.
        data: batches for methods that look at data first (tags `needs_data`, `data_options`): mappings are called as
            model(**batch), tuples as model(*batch), functions as batch(model); the output is, or has, the loss. Where a
            method wants labels and the model takes none, batches are `Labelled`.
        seed: operators are drawn from (seed, path); torch's initial seed by default. The global generator does not
            move.
        dtype: dtype of the operators, float32 by default.
        host: a host map to use instead of the derived one (`peftcore.roles.probe`, `HostMap.override`).
        config: the method's options.

    Where DeepSpeed has cut the model apart as it was made (`zero.Init`), all processes call this, and each holds all of
    it meanwhile.

    Raises:
        UnknownMethod: no plugin has it; AmbiguousMethod: two have.
        ConfigError: an option is unknown, or its value breaks a rule.
        TargetError: there is nothing to act on.
        UnsupportedSite: the method cannot act on the target.
        UnsupportedHost: this host cannot be adapted as a whole.
        DuplicateInjection: the name is taken or cannot be used.
        CalibrationError: data is missing, or of no use to the method.
        PluginError: the method breaks its contract.

    Nothing was changed then. The logger "peftcore" says in one line, once in a process, that a method is experimental
    (`MethodInfo.proven`), which other default targets were taken where the host has none of the method's own
    (`Method.alternatives`), and which parts of the host they leave out.
    """
    check_model(model)
    if is_peft_config(method):
        _check_alone(method, target, exclude, train, data, dtype, host, config)
        injection: Injection = imported(OF_PEFT)(model, method, name=name, seed=seed)
        return injection
    with at_hand(model.parameters()):
        found, options = resolve_method(method, config)
        target, train, host, called = with_preset(method, model, target, train, host)
        name = check_name(model, (called or found.name) if name is None else name)
        wishes = wishes_of(target, exclude, train, seed, dtype)
        if type(found).structure is not Method.structure and data is not None:
            host = host or host_map(model)
            planned = prepare(model, found, options, wishes, host, dry=True)
            sites = [replace(graft.site, meta=False) for graft in planned.grafts]
            options, left_out = find_structure(found, model, data, options, sites)
            wishes = replace(wishes, left_out=left_out)
        surgeon = prepare(model, found, options, wishes, host, dry=False)
        _check_data(surgeon, data)
        if data is not None and any(graft.site.layer.in_pieces for graft in surgeon.grafts):
            raise UnsupportedHost(f"{PIECES}. {found.name} looks at what layers are given, which are pieces")
        if data is not None:
            _check_parts(surgeon, data)
        injection = establish(surgeon, name, data)
        notice(surgeon.notices)
        return injection


def _check_alone(method: object, *others: Any) -> None:
    """Check that a configuration of peft comes without other arguments.

    Raises:
        ConfigError: which would say the same twice, or something else.
    """
    if any(each is not None and each != () and each != {} for each in others):
        raise ConfigError(f"a {type(method).__name__} of peft says where and how by itself; leave other arguments out")


def _check_data(surgeon: Surgeon, data: Data | None) -> None:
    """Check that data is given exactly when the method, or a part of a hybrid, needs it."""
    curious = [each.method.name for each in _surgeons(surgeon) if each.method.looks_at_data(each.config)]
    if curious and data is None:
        raise CalibrationError(f"{curious[0]} looks at data before training: apply(..., data=batches)")
    if data is not None and not curious:
        some = surgeon.method.tags.data_options or {}
        values = {option: value if isinstance(value, tuple) else (value,) for option, value in some.items()}
        but = "".join(f"; it does with {option}={' or '.join(map(repr, each))}" for option, each in values.items())
        raise CalibrationError(f"{surgeon.method.name} looks at no data before training{but}; leave data= out")


def _check_parts(surgeon: Surgeon, data: Data) -> None:
    """Check that the data decides no options of a part of a hybrid, which are those that its file has.

    Raises:
        ConfigError: it does, and what the part has to be told.
    """
    _, *parts = _surgeons(surgeon)
    for part in parts:
        if type(part.method).structure is Method.structure:
            continue
        sites = [graft.site for graft in part.grafts]
        options, left_out = find_structure(part.method, surgeon.model, data, part.config, sites)
        new = {path: own for path, own in options.overrides.items() if path not in part.config.overrides}
        if new or left_out:
            path, told = next(iter(new.items())) if new else (min(left_out), None)
            instead = f"exclude={path!r}" if told is None else f"overrides={{{path!r}: {told!r}}}"
            raise ConfigError(
                f"data decides how {part.method.name} adapts {len(new) + len(left_out)} single sites, which it does by "
                f"itself and not as a part: apply it alone, or tell the part what it found, {instead} and so on"
            )


def _surgeons(surgeon: Surgeon) -> Iterator[Surgeon]:
    yield surgeon
    for part in surgeon.parts.values():
        yield from _surgeons(part)


def check_name(model: nn.Module, name: str) -> str:
    """Returns the name, if an injection of this host may have it.

    Raises:
        DuplicateInjection: it is taken, empty, or has a dot.
    """
    state = state_of(model)
    if not name or "." in name or name in dir(nn.Module):
        raise DuplicateInjection(
            f"an injection cannot be called {name!r}: not empty, no dots, no attribute of nn.Module"
        )
    if state is not None and name in state.injections:
        raise DuplicateInjection(
            f"this host already has an injection named {name!r}; give another name=, or remove() it first"
        )
    return name


def _together(state: HostState, stack: Active, name: str) -> Active:
    """Returns the stack with which a new injection looks at data: itself alone, where it cannot act with the others."""
    try:
        for slot in state.slots:
            slot.check_stack(stack)
    except CompositionError:
        return (name,)
    return stack


def establish(
    surgeon: Surgeon, name: str, data: Data | None = None, *, active: bool = True, instead: Collection[str] = ()
) -> Injection:
    """Install the recorded operators, register the injection with the host, and let the method look at the data, if
    there is any. The injection is active from then on, unless `active` is False, in place of those named in `instead`.
    """
    model = surgeon.model
    fresh = state_of(model) is None
    state = begin_state(model, surgeon.resolver.modules.values())
    injection = Injection(name, surgeon, state)
    made_of_base.check_nothing_merged(injection, state)
    with nullcontext() if state.residency is None else state.residency.joining(injection):
        _establish(injection, surgeon, fresh, data, active, instead)
    return injection


def begin_state(model: nn.Module, modules: Collection[nn.Module]) -> HostState:
    """Returns the host's state, made when missing."""
    fresh = state_of(model) is None
    state = ensure_state(model, modules)
    if fresh:
        state.loading.append(model.register_load_state_dict_post_hook(made_of_base.make_anew))  # type: ignore[no-untyped-call]
    return state


def _establish(
    injection: Injection, surgeon: Surgeon, fresh: bool, data: Data | None, active: bool, instead: Collection[str]
) -> None:
    model, state, name = injection.model, injection.state, injection.name
    state.injections[name] = injection
    state.reads_tokens += injection.reads_tokens
    state.placement = state.placement or Placement()
    state.placement.expect(name, surgeon.grafts)
    thawed = surgeon.thawed
    choices, before = state.choices, state.choices.saved()
    try:
        install(surgeon, state, name)
        freezing.freeze(thawed)
        if active:
            stack = choices.add(name, instead)
        else:
            stack = (name,)
            state.replan()
        injection.trainable(True)
        made_of_base.note_base(injection)
        silent_layers.watch(surgeon, state, name)
        if data is not None:  # the model that it looks at has it, in a route and a composition too
            with choices.held(Choice(_together(state, stack, name), context=choices.around().context)):
                calibrate(injection, data)
    except BaseException:
        silent_layers.forget(state, name)
        del state.injections[name]
        state.reads_tokens -= injection.reads_tokens
        choices.restore(before)
        uninstall(surgeon, state, name)
        state.replan()
        freezing.thaw(thawed)
        if fresh:
            release(model, state)
            drop_state(model)
        raise
    state.frozen += thawed
    surgeon.thawed = []  # held by the state alone: a merge may take them out of the host
    notice_experimental(each.method for each in _surgeons(surgeon))


def plan(
    model: nn.Module,
    method: str | MethodConfig | type[Method] | Sequence[Part],
    *,
    target: Target | None = None,
    exclude: Target | None = None,
    train: Sequence[str] | str = (),
    data: Data | None = None,
    seed: int | None = None,
    dtype: torch.dtype | str | None = None,
    host: HostMap | None = None,
    shards: int | None = None,
    **config: Any,
) -> Plan:
    """Returns the sites, shapes, parameters and bytes of `apply` with the same arguments. Nothing is changed or
    allocated.

    The host may be on the meta device; data is not looked at.

    Args:
        shards: a number of processes over which FSDP2 shards the model; the plan has what each of them holds.

    Raises:
        PeftcoreError: the same errors as `apply`; UnsupportedHost also where a parameter cannot be sharded.
    """
    check_model(model)
    found, options = resolve_method(method, config)
    target, train, host, _ = with_preset(method, model, target, train, host)
    with at_hand(model.parameters()):
        surgeon = prepare(model, found, options, wishes_of(target, exclude, train, seed, dtype), host, dry=True)
        return Plan.of(surgeon, shards)
