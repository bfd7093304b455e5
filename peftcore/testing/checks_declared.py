"""Checks of what a method says of itself: tags, sizes, options."""

from __future__ import annotations

import torch

from peftcore.config import validate_json
from peftcore.errors import ConfigError
from peftcore.operators import Replacement
from peftcore.testing.kit import Case, check
from peftcore.testing.tools import differences, raises, trace


@check(
    "a method that claims no identity at init changes outputs at init",
    "the tag `identity_at_init=False` is outdated; users would pay for a switch that nothing needs",
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
    "the formula forgot a bias, the kernel, or the number of experts",
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
    "injecting does not change the config object", "`inject` or an operator writes into a list or dict of the config"
)
def the_config_is_not_changed(case: Case) -> None:
    model, _ = case.fresh()
    before = case.method.Config.model_validate(dict(case.options)).model_dump_json()
    injection = case.apply(model)
    case.expect(injection.config.model_dump_json() == before, "the config changed while injecting")


@check(
    "a config is written the same in every process, and read back equal",
    "a set among the options: its order is another one in each process; use a list",
    hosts=("mlp",),
)
def configs_are_written_in_one_order(case: Case) -> None:
    config = case.method.Config.model_validate(dict(case.options))
    unordered = [name for name, value in config.model_dump().items() if isinstance(value, set | frozenset)]
    case.expect(not unordered, f"options without an order: {', '.join(unordered)}")
    case.expect(validate_json(type(config), config.model_dump_json()) == config, "it is read back as another one")


@check(
    "unknown options are a ConfigError",
    'the Config loosens `extra="forbid"`, so that misspelled options are lost',
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
    "a field of Config has no docstring below it; forms and help are made of them",
    hosts=("mlp",),
)
def every_option_is_described(case: Case) -> None:
    own = {name: field for name, field in case.method.Config.model_fields.items() if name != "method"}
    silent = [name for name, field in own.items() if not field.description]
    case.expect(not silent, f"options without a description: {', '.join(silent)}")


@check(
    "`low_rank` is claimed exactly when factors() gives the update of the effective weight",
    "the scale is left out of factors(), or the tag was forgotten",
)
def factors_are_the_update(case: Case) -> None:
    model, _ = case.fresh(torch.float64)
    injection = case.filled(model, dtype="float64")
    grafts = [graft for graft in injection.grafts if graft.by_method and not isinstance(graft.operator, Replacement)]
    given = [(graft, factors) for graft in grafts if (factors := graft.operator.factors()) is not None]
    claimed, all_give = case.tags.low_rank, len(given) == len(grafts) > 0
    case.expect(claimed == all_give, f"low_rank={claimed}, but {len(given)} of {len(grafts)} operators give factors")
    with injection.disabled():
        for graft, (A, B, scale) in given:
            weight = graft.site.weight()
            update = scale * (B @ A.flatten(graft.site.layer.batch_dims + 1)).view(weight.shape)
            case.expect_close(graft.operator.merged(weight) - weight, update, f"{graft.site.path}: merged minus base")
