"""`apply` and `plan`: adapt a model with a method, or return what that would come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftcore.contract.config import MethodConfig
from peftcore.contract.method import Method
from peftcore.contract.peft_names import is_peft_config
from peftcore.errors import CalibrationError, ConfigError
from peftcore.injection.arguments import Part, check_model, host_map, resolve_method, wishes_of, with_preset
from peftcore.injection.establishing import check_name, establish
from peftcore.injection.injection import Injection
from peftcore.injection.recording import plan_of, prepare
from peftcore.layers.pieces import at_hand
from peftcore.registry.plugins import imported
from peftcore.roles import HostMap
from peftcore.surgery import parallel_models
from peftcore.surgery.planning import Plan
from peftcore.surgery.surgeon import Surgeon
from peftcore.targets.resolver import Target
from peftcore.training.batches import Data, find_structure
from peftcore.utils.notices import notice

OF_PEFT = "peftcore.files.peft_configs:apply_peft_config"
"""The function that applies a configuration of peft; named, not imported, since it is in a layer above."""


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

    Nothing was changed then. The logger "peftcore" says in one line, once in a process, that a method is equation only
    (not `MethodInfo.checked`), which other default targets were taken where the host has none of the method's own
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
        if data is not None:
            parallel_models.check_looks_at_no_data(surgeon)
            _check_parts(surgeon, data)
        injection = establish(surgeon, name, data)
        notice(surgeon.notices)
        return injection


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
        return plan_of(surgeon, shards)


def _check_alone(method: object, *others: Any) -> None:
    """Check that a configuration of peft comes without other arguments.

    Raises:
        ConfigError: which would say the same twice, or something else.
    """
    if any(each is not None and each != () and each != {} for each in others):
        raise ConfigError(f"a {type(method).__name__} of peft says where and how by itself; leave other arguments out")


def _check_data(surgeon: Surgeon, data: Data | None) -> None:
    """Check that data is given exactly when the method, or a part of a hybrid, needs it."""
    curious = [each.method.name for each in surgeon.with_parts() if each.method.looks_at_data(each.config)]
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
    _, *parts = surgeon.with_parts()
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
