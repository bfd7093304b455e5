"""Checks of a method's declarations: tags, sizes, options."""

from __future__ import annotations

import torch

from peftcore.contract.config import validate_json
from peftcore.contract.operators import Replacement
from peftcore.errors import ConfigError
from peftcore.testing.kit import Case, check
from peftcore.testing.tools import differences, raises, trace


@check(
    "a method that claims no identity at init changes outputs at init",
    cause="the tag `identity_at_init=False` is outdated; users would pay for a switch that nothing needs",
    remedy="take the tag away, and `identity_options` with it",
    when=lambda tags: not tags.identity_at_init,
    hosts=("mlp", "encoder", "llama", "bert", "t5", "gpt2", "convnet"),  # grouped matrix products know no float64
)
def a_denied_identity_is_none(case: Case) -> None:
    model, inputs = case.fresh(torch.float64)
    base = case.quiet(model, inputs)
    case.apply(model, dtype="float64")
    moved = (case.quiet(model, inputs) - base).abs().max().item()
    case.expect(moved > 1e-9, f"with default options a fresh adapter moves the output by {moved:.1e} only")


@check(
    "the closed formula gives the number of parameters at each site",
    cause="the formula forgot a bias, the kernel, or the number of experts",
    remedy="compare it with the shapes in the operator's `__init__`; `math.prod(site.batch)` and "
    "`math.prod(site.kernel)` help",
)
def the_parameter_count_is_the_declared_one(case: Case) -> None:
    model, _ = case.fresh()
    injection = case.apply(model)
    for graft in injection.grafts:
        real = sum(parameter.numel() for parameter in graft.operator.parameters())
        owner = injection.owner(graft)
        declared = owner.method.parameter_count(graft.site, owner.config.at(graft.site.path))
        case.expect(real == declared, f"{graft.site.path}: {declared} declared, {real} there")


@check(
    "injecting does not change the config object",
    cause="`inject` or an operator writes into a list or dict of the config",
    remedy="copy it before (`list(config.names)`); what is found out belongs on the operator",
)
def the_config_is_not_changed(case: Case) -> None:
    model, _ = case.fresh()
    before = case.method.Config.model_validate(case.settings).model_dump_json()
    injection = case.apply(model)
    case.expect(injection.config.model_dump_json() == before, "the config changed while injecting")


@check(
    "a config is written the same in every process, and read back equal",
    cause="a set among the options: its order is another one in each process",
    remedy="use a list or a tuple",
    hosts=("mlp",),
)
def configs_are_written_in_one_order(case: Case) -> None:
    config = case.method.Config.model_validate(case.settings)
    unordered = [name for name, value in config.model_dump().items() if isinstance(value, set | frozenset)]
    case.expect(not unordered, f"options without an order: {', '.join(unordered)}")
    case.expect(validate_json(type(config), config.model_dump_json()) == config, "it is read back as another one")


@check(
    "unknown options are a ConfigError",
    cause='the Config loosens `extra="forbid"`, or a validator drops what it does not know',
    remedy="leave `model_config` alone; an option that is gone belongs to `migrate`",
    hosts=("mlp",),
)
def misspelled_options_are_refused(case: Case) -> None:
    model, _ = case.fresh()
    before = trace(model)
    with raises(case, ConfigError, "apply() with an option that does not exist"):
        case.apply(model, no_such_option=1)
    case.expect(not (wrong := differences(before, trace(model))), f"other than before: {wrong}")


@check(
    "every option says what it does",
    cause="a field of Config has no docstring below it; forms and help are made of them",
    remedy="write one below each field that is named above",
    hosts=("mlp",),
)
def every_option_is_described(case: Case) -> None:
    own = {name: field for name, field in case.method.Config.model_fields.items() if name != "method"}
    silent = [name for name, field in own.items() if not field.description]
    case.expect(not silent, f"options without a description: {', '.join(silent)}")


@check(
    "`low_rank` is claimed exactly when factors() gives the update of the effective weight",
    cause="the scale is left out of factors(), or the tag was forgotten",
    remedy="return (A, B, scale) so that scale * B @ A is `merged` minus the base; declare `low_rank` if every "
    "operator does",
)
def factors_are_the_update(case: Case) -> None:
    model, _ = case.fresh(torch.float64)
    injection = case.filled(model, dtype="float64")
    grafts = [
        graft
        for graft in injection.grafts
        if graft.by_method and not (isinstance(graft.operator, Replacement) or graft.operator.trains_only)
    ]
    given = [(graft, factors) for graft in grafts if (factors := graft.operator.factors()) is not None]
    claimed, all_give = case.tags.low_rank, len(given) == len(grafts) > 0
    case.expect(claimed == all_give, f"low_rank={claimed}, but {len(given)} of {len(grafts)} operators give factors")
    with injection.disabled():
        for graft, (A, B, scale) in given:
            weight = graft.site.weight()
            update = scale * (B @ A.flatten(graft.site.layer.batch_dims + 1)).view(weight.shape)
            case.expect_close(graft.operator.merged(weight) - weight, update, f"{graft.site.path}: merged minus base")
