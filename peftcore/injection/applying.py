"""Installs an adapter in a model, in the same steps for all callers: record the operators (`record`), install them
(`install`), let the method look at data, and fill in values. An error or an interrupt undoes all steps.

`apply` makes a `Request` from its arguments, `load` from a file, `combine` and related functions from other adapters.
`plan` only records operators, so it changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftcore.contract.batches import Data
from peftcore.contract.config import MethodConfig
from peftcore.contract.method import Method
from peftcore.errors import ConfigError, UnsupportedHost
from peftcore.forward.choice.active_adapters import Active, Choice
from peftcore.forward.state.host_state import HostState, ensure_state
from peftcore.injection import base_dependence
from peftcore.injection.applied import Planned, choose_trained
from peftcore.injection.freezing import freeze
from peftcore.injection.injection import Injection
from peftcore.injection.request import Part, Request, check_model, check_name
from peftcore.layers.model_locks import changing
from peftcore.layers.pieces import at_hand, is_in_engine
from peftcore.registry.equation_only import notice_equation_only
from peftcore.registry.peft_names import is_peft_config
from peftcore.registry.plugins import imported, layer_of
from peftcore.roles import HostMap
from peftcore.surgery import installation
from peftcore.surgery.planning import Plan
from peftcore.surgery.surgeon import RecordingSurgeon
from peftcore.surgery.watched_sites import watched_sites
from peftcore.targets.resolver import Resolver, Target
from peftcore.training.calibration import calibrate, find_structure
from peftcore.utils.journal import Journal
from peftcore.utils.notices import notice

OF_PEFT = "peftcore.files.peft_configs:apply_peft_config"
"""The import path of the function that applies a configuration of peft. The function is in a higher layer of the
package, so it is not imported here."""


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
    """Adapt any module in place with a method.

    The base is frozen, the operators are trainable, and the injection is active. Other injections on the host stay as
    they are. A call inside a route or composition does not change that route or composition: the new injection is
    active outside of it. The injection is active in the same threads and tasks as after a call of `activate`: in all
    that have not made a separate choice, or if another thread adapted the model first, in the calling thread alone.

    Args:
        model: the host. It is changed in place; its class and parameter names stay the same.
        method: a name, ``"plugin/name"``, a config object, or a method class; a list of names, config objects or
            mappings (``{"method": "lora", "rank": 4, "target": "attn.q"}``) applies all of them as one injection. A
            configuration of peft (LoraConfig) is also accepted, and is read like a file of peft. Then only `name` and
            `seed` may be passed in addition.
        name: the name of the injection on this host, without dots; by default the name of the method.
        target: where to act, instead of the method's default roles: a role ("attn.q", "all-linear"), a glob, ends of
            paths, "re:…", a type, a predicate of (path, module), or a list of these.
        exclude: targets to leave out, in the same forms.
        train: modules of the host (heads, norms) that train too; their trained copies are saved with the adapter.
        data: batches for methods that look at data first (tags `needs_data`, `data_options`). A mapping is passed as
            model(**batch), a tuple as model(*batch); a function is called as batch(model). The output must be the loss,
            or contain it. If a method needs labels and the model does not take any, pass batches of the class
            `Labelled`.
        seed: operators are initialized from (seed, path); torch's initial seed by default. The state of torch's global
            generator does not change.
        dtype: dtype of the operators, float32 by default.
        host: a host map to use instead of the derived one (`peftcore.roles.probe`, `HostMap.override`).
        config: the method's options.

    If DeepSpeed sharded the model when it was built (`zero.Init`), all processes call `apply`, and each holds the whole
    model during the call.

    Raises:
        UnknownMethod: no plugin has the method; AmbiguousMethod: two plugins have it.
        ConfigError: an option is unknown, or its value breaks a rule.
        TargetError: the host has no target for the method.
        UnsupportedSite: the method cannot act on the target.
        UnsupportedHost: this kind of model cannot be adapted.
        DuplicateInjection: the name is taken or cannot be used.
        CalibrationError: data is missing, or the method cannot use it.
        PluginError: the method breaks its contract.

    After an error the host is unchanged. The logger "peftcore" reports the following, each in one line and once per
    process: that a method was implemented from its equations only (not `MethodInfo.checked`); which other targets
    replace the method's default targets if the host lacks those (`Method.alternatives`); and which parts of the host
    the replacements leave out.
    """
    check_model(model)
    with changing(model):
        if is_peft_config(method):
            _check_alone(method, target, exclude, train, data, dtype, host, config)
            injection: Injection = imported(OF_PEFT)(model, method, name=name, seed=seed)
            return injection
        request = Request.of(
            model,
            method,
            config,
            name=name,
            target=target,
            exclude=exclude,
            train=train,
            data=data,
            seed=seed,
            dtype=dtype,
            host=host,
        )
        return apply_request(request)


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
    """Returns what `apply` would install with the same arguments: sites, shapes, parameters and bytes. Nothing is
    changed or allocated.

    The host may be on the meta device. The method does not look at `data`.

    Args:
        shards: the number of processes over which FSDP2 will shard the model. The plan then also says how much each
            process holds.

    Raises:
        PeftcoreError: the same errors as `apply`. UnsupportedHost also if a parameter cannot be sharded.
    """
    check_model(model)
    with changing(model):
        request = Request.of(
            model, method, config, target=target, exclude=exclude, train=train, seed=seed, dtype=dtype, host=host
        )
        with at_hand(model.parameters()):
            return plan_of(record(request, dry=True), shards)


def apply_request(request: Request) -> Injection:
    """Carry out a request: install its adapter in its model. `apply` makes a request from its arguments and calls this.

    Raises:
        PeftcoreError: the errors of `apply`, or of the request's function `fill`. Nothing was changed then.
    """
    with changing(request.model), at_hand(request.model.parameters()):
        check_name(request.model, request.name)
        request = _decided_by_data(request)
        surgeon = record(request)
        request.check_data(surgeon)
        notice(surgeon.notices)
        return install(surgeon, request)


def _decided_by_data(request: Request) -> Request:
    """Returns the request with the options and sites that its method chooses by looking at the data. Without data, or
    if the method makes no such choice, returns the request unchanged."""
    method, data = request.method, request.data
    if data is None or type(method).structure is Method.structure:
        return request
    request = replace(request, host=request.map)
    sites = [replace(graft.site, meta=False) for graft in record(request, dry=True).grafts]
    config, left_out = find_structure(method, request.model, data, request.config, sites)
    return replace(request, config=config, wishes=replace(request.wishes, left_out=left_out))


def record(request: Request, dry: bool = False) -> RecordingSurgeon:
    """Returns a `RecordingSurgeon`, which contains the sites and the operators of the request's method. The operators
    are created but not installed, so the model is unchanged.

    Args:
        request: the request.
        dry: whether to create the operators on the meta device, without values. `plan` does this.

    Raises:
        UnsupportedHost: the model is wrapped in DataParallel or in DeepSpeed's engine, is a TorchScript module, or has
            lazy parameters without shapes.
        TargetError: no site matches the target.
    """
    model, config = request.model, request.config
    _check_adaptable(model)
    for changes in config.overrides.values():
        config.replace(**{**changes, "overrides": {}})  # wrong options are errors, also where no site matches
    resolver = Resolver(model, request.map, layer_of)
    surgeon = RecordingSurgeon(model, request.method, config, resolver, request.wishes, dry)
    surgeon.record()
    if idle := surgeon.idle_overrides():
        text = f"these overrides match no site and are ignored: {idle}"
        warnings.warn(text, UserWarning, stacklevel=3 if dry else 4)
    return surgeon


def plan_of(surgeon: RecordingSurgeon, shards: int | None = None) -> Plan:
    """Returns the plan of a dry run (`record` with `dry`). The method first selects the parameters that would train."""
    choose_trained(Journal(), Planned(surgeon))
    return Plan.of(surgeon, shards)


def install(surgeon: RecordingSurgeon, request: Request) -> Injection:
    """Install the recorded operators, and register the injection with the host. Then let the method look at the data
    and fill in values, if the request has any. Returns the injection.

    Args:
        surgeon: the result of `record` for this request.
        request: the request.
    """
    with Journal() as journal:
        modules = surgeon.resolver.modules.values()
        state = ensure_state(journal, surgeon.model, modules, base_dependence.make_anew)
        injection = Injection(request.name, surgeon, state)
        base_dependence.check_nothing_merged(injection, state)
        with nullcontext() if state.residency is None else state.residency.joining(injection):
            stack = _put_in(journal, injection, state, request)
            base_dependence.note_base(injection)
            if request.data is not None:  # the model that it looks at has it, in a route and a composition too
                choices = state.choices
                with choices.held(Choice(state.together(stack, injection.name), context=choices.around().context)):
                    acting = [state.injections[each] for each in state.current()]
                    calibrate(injection, request.data, injection.base_modules(), acting)
            if request.fill is not None:
                request.fill(injection)
            notice_equation_only(each.method for each in surgeon.with_parts())
            if request.active:  # last: forwards of other threads that begin before do not see it half made
                state.choices.add(request.name, request.instead)
    return injection


def _put_in(journal: Journal, injection: Injection, state: HostState, request: Request) -> Active:
    """Install the operators and register the injection with the host. Returns the names of the injections that will be
    active together with it, in order."""
    name, surgeon = injection.name, injection._surgeon
    journal.afterwards(state.choices.restore, state.choices.saved())
    journal.afterwards(injection._replan)
    journal.put(state, "injections", name, injection)
    journal.set(state, "reads_tokens", state.reads_tokens + injection.reads_tokens)
    installation.install(journal, surgeon, state, name)
    journal.set(state, "frozen", state.frozen + freeze(journal, surgeon.resolver.parameters()))
    state.replan()
    injection.trainable(True)
    watched_sites(state).expect(journal, surgeon, state, name)
    return state.choices.joined(name, request.instead) if request.active else (name,)


def _check_alone(method: object, *others: Any) -> None:
    """Check that a configuration of peft comes without other arguments.

    Raises:
        ConfigError: another argument was passed. The configuration of peft already contains all options.
    """
    if any(each is not None and each != () and each != {} for each in others):
        raise ConfigError(
            f"a peft {type(method).__name__} already contains all options: call peftcore.apply(model, config) without "
            "other arguments"
        )


def _check_adaptable(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel):
        raise UnsupportedHost(
            "DataParallel copies modules in every forward; use DistributedDataParallel, and apply to the module inside"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedHost("TorchScript modules cannot change; apply before scripting, merge, then script")
    if is_in_engine(model):
        raise UnsupportedHost(
            "DeepSpeed's engine (ZeRO-3) already holds the model and would not train new parameters: call apply before "
            "deepspeed.initialize"
        )
