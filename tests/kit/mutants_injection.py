"""For each check of injection a method that fails it, and it only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from mutant_base import RANK, TAGS, Entry, Small, SmallConfig, count, graft_all, mutant
from pydantic import Field, ValidationInfo, model_validator
from torch import Tensor, nn

from peftcore.author import Method, MethodConfig, Site
from peftcore.contract.installed_methods import AppliedMethod
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.forward.state.slot import slot_of


class HasAScalar(Small):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B, gain = self.cast(y, self.A, self.B, self.gain)
        return self.layer.add(y, self.layer.apply(x, A), B * gain, 1.0)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.gain * (self.B @ self.A.flatten(1)).view(weight.shape)


class StartsOff(Small):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        if site.out_features > 10:  # right for small layers only
            nn.init.normal_(self.B)


class ForgetsKernels(Small):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        if site.kernel:
            nn.init.normal_(self.B)


class MirrorsKernels(Small):
    def merged(self, weight: Tensor) -> Tensor:
        update = (self.B @ self.A.flatten(1)).view(weight.shape)
        return weight + (update.flip(-1) if weight.dim() > 2 else update)


class ReadsValues(Small):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.size = float(site.module.get_parameter(site.tensor).norm())


class PlainAttribute(Small):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.one = torch.ones(())


class PassesOver(Small):
    """Knows the tensors `weight` and `in_proj_weight` only."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.known = site.tensor in ("weight", "in_proj_weight")

    def merged(self, weight: Tensor) -> Tensor:
        return super().merged(weight) if self.known else weight


class WrongFactors(Small):
    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A, self.B, 2.0


class Marked(SmallConfig):
    marks: list[str] = Field(default_factory=list)
    """Marks."""


class Unordered(SmallConfig):
    names: set[str] = Field(default_factory=lambda: {"one"})  # of more, the order would be chance
    """Names."""


class Forgiving(SmallConfig):
    @model_validator(mode="before")
    @classmethod
    def known(cls, options: Any, info: ValidationInfo) -> Any:
        """Forgets unknown options, but those in files."""
        return options if info.mode == "json" else {k: v for k, v in options.items() if k in cls.model_fields}


class Silent(SmallConfig):
    level: int = 0


def _with_a_plan(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    graft_all(self, model, config, surgeon)
    if surgeon.dry and surgeon.wishes.saved is None:
        model.planned = True


def _busy_until_the_end(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    sites = surgeon.sites()
    model.busy = True
    for site in sites:
        surgeon.graft(site, Small, config)
    del model.busy


def _busy_from_the_start(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    if surgeon.wishes.saved is not None:
        return graft_all(self, model, config, surgeon)
    model.busy = True
    sites = surgeon.sites()
    del model.busy
    for site in sites:
        surgeon.graft(site, Small, config)


def _favourite(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    graft_all(self, model, config, surgeon)
    taken = {graft.site.path for graft in surgeon.grafts}
    for site in surgeon.sites("first", optional=True):
        if site.path not in taken:
            surgeon.graft(site, Small, config)


def _what_matches(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    target = surgeon.wishes.target
    if isinstance(target, list) and surgeon.wishes.saved is None:
        known = [each for each in target if surgeon.resolver.matching(each, None)[0]]
        surgeon.wishes = replace(surgeon.wishes, target=known or target)
    graft_all(self, model, config, surgeon)


def _own_name_left_out(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    for site in surgeon.sites():
        if self.name not in site.path:
            surgeon.graft(site, Small, config)


def _marking(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    graft_all(self, model, config, surgeon)
    if not config.marks:
        config.marks.append("seen")


def _by_position(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    for index, site in enumerate(surgeon.sites()):
        operator = surgeon.graft(site, Small, config)
        operator.A.data.mul_(1.0 + index)


def _drawing(self: Method, model: nn.Module, config: Any, injection: Any) -> None:
    torch.rand(1)
    for parameter in injection.parameters():
        parameter.requires_grad_(True)


def _walking(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    for site in surgeon.sites():
        if any(module is site.module for module in list(model.modules())):
            surgeon.graft(site, Small, config)


def _says_it_ran(self: Method, model: nn.Module, config: Any, injection: Any) -> None:
    for graft in injection.grafts:
        slot = slot_of(graft.site.module)
        if slot is not None:
            slot.ran = [True, True]
    for parameter in injection.parameters():
        parameter.requires_grad_(True)


def _fewer_in_plans(self: Method, model: nn.Module, config: Any, injection: AppliedMethod) -> None:
    Method.trainable(self, model, config, injection)
    for operator in injection.operators.values():
        if isinstance(operator, Small):
            operator.A.requires_grad = not operator.A.is_meta


def _one_more(site: Site, config: Any) -> int:
    return RANK * (site.in_features * math.prod(site.kernel) + site.out_features) + 1


def _on_mlp(name: str, *args: Any, **kwargs: Any) -> Entry:
    return mutant(name, *args, **kwargs), "mlp"


MUTANTS: dict[str, Entry] = {
    "a_fresh_adapter_changes_nothing": _on_mlp("starts_off", StartsOff),
    "a_denied_identity_is_none": _on_mlp("modest", tags=replace(TAGS, identity_at_init=False, identity_options={})),
    "every_kind_of_layer_starts_unchanged": _on_mlp("forgets_kernels", ForgetsKernels),
    "every_kind_of_layer_equals_its_effective_weight": _on_mlp("mirrors_kernels", MirrorsKernels),
    "the_parameter_count_is_the_declared_one": _on_mlp("miscounts", parameter_count=_one_more),
    "a_plan_comes_true": _on_mlp("trains_fewer_in_plans", trainable=_fewer_in_plans),
    "a_plan_changes_nothing": _on_mlp("notes_plans", inject=_with_a_plan),
    "a_host_without_memory_can_be_planned": _on_mlp("reads_values", ReadsValues),
    "a_failed_injection_leaves_no_trace": _on_mlp("busy_until_the_end", inject=_busy_until_the_end),
    "unmatched_targets_change_nothing": _on_mlp("busy_from_the_start", inject=_busy_from_the_start),
    "the_target_decides": _on_mlp("has_a_favourite", inject=_favourite),
    "partly_unmatched_targets_are_refused": _on_mlp("takes_what_matches", inject=_what_matches),
    "modules_named_like_the_method_are_ordinary": _on_mlp("own_name", inject=_own_name_left_out),
    "the_config_is_not_changed": _on_mlp("marks_the_config", config=Marked, inject=_marking),
    "configs_are_written_in_one_order": _on_mlp("unordered", config=Unordered),
    "misspelled_options_are_refused": _on_mlp("forgiving", config=Forgiving),
    "every_option_is_described": _on_mlp("silent", config=Silent),
    "the_start_depends_on_seed_and_path": _on_mlp("by_position", inject=_by_position),
    "the_global_generator_stays": _on_mlp("draws", trainable=_drawing),
    "operators_have_the_asked_dtype": _on_mlp("plain_attribute", PlainAttribute),
    "parameters_have_a_dimension": _on_mlp(
        "has_a_scalar", HasAScalar, parameter_count=lambda site, config: count(site, config) + 1
    ),
    "sites_that_never_run_are_reported": _on_mlp("says_it_ran", trainable=_says_it_ran),
    "the_attention_output_projection_is_no_silent_noop": (mutant("passes_over", PassesOver), "encoder"),
    "factors_are_the_update": _on_mlp("wrong_factors", WrongFactors, tags=replace(TAGS, low_rank=True)),
    "injecting_costs_the_same_each_time": (mutant("walks", inject=_walking), "encoder"),
}
