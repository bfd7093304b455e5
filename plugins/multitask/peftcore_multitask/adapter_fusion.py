"""AdapterFusion: attention over adapters.   Pfeiffer et al. 2021, arXiv 2005.00247 (code: adapter-hub/adapters).

Equation:
    y = h + V sum_t a_t z_t,   a = softmax_t((Q h + q) . K z_t),   z_t = y_t - h

h is a module's output without adapters, and y_t is its output with adapter t alone. Each token weighs the changes that
the adapters make. At a norm that ends a block, adapters may change only the norm's input. There the fusion mixes these
inputs, as the adapters package does (option `mixes`). s is the norm's input without adapters, s_t its input with
adapter t, and z_t = s_t - s,

    y = LN(s + V sum_t a_t z_t),   h = LN(s) in the scores

The loss gets regularizer * |V - I|^2 from each module. To fuse adapters of the model:

    peftcore.apply(model, "adapter_fusion", name="fusion", adapters=["a", "b"])
    peftcore.activate(model, Fuse("a", "b", by="fusion"))

The fusion acts at the modules at which its adapters act; the order of the adapters does not matter. (Norms that the
adapters train are averaged.) Without its adapters, the fusion does not change the model. It does not freeze them; to
freeze one, call ``injections(model)["a"].trainable(False)``. Without the option `adapters`, the fusion creates its own
adapters from `parts`, and forms one adapter with them. With train_parts=False they are frozen.

Parameters: 3 d^2 + d per module (2 d^2 + d without V), and those of the parts that it owns.

Start: Q and K start from N(0, 0.02), q at zero, V as the identity with 1e-6 off its diagonal: at first the fusion is
close to the mean of the adapters, as long as they add little. With fresh adapters that add nothing, it is the identity.

Differs from the authors' code: In the adapters package K has a bias, which is left out here, since it adds the same
number to all scores of a token and cancels. The package's temperature, which changes in evaluation, is left out too.
The package drops scores with the attention dropout of the model; here the option `dropout` sets it, 0 by default. The
paper freezes the adapters that it mixes; here the fusion does not change whether adapters of the model train.

Use it: `peftcore.apply(model, "adapter_fusion")`, for a task that can use adapters which were trained separately for
other tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

import peftcore
from peftcore import injections
from peftcore.author import (
    AppliedMethod,
    Calls,
    Combiner,
    Graft,
    LearningRate,
    Method,
    MethodConfig,
    OneForward,
    Replacement,
    Share,
    Site,
    Surgeon,
    Tags,
    on_first,
    options_of,
)
from peftcore.errors import CompositionError, ConfigError, UnknownInjection, UnsupportedSite
from peftcore_multitask._merging import MOST, OfMergedParts

ADAPTER = {"method": "pfeiffer_adapter", "placement": "branch"}


class AdapterFusionConfig(MethodConfig):
    """Options of AdapterFusion."""

    method: Literal["adapter_fusion"] = "adapter_fusion"
    adapters: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the host's injections to fuse. None: the fusion creates its own adapters from `parts`."""
    parts: list[dict[str, Any]] = Field(
        default_factory=lambda: [{**ADAPTER}, {**ADAPTER}], min_length=1, max_length=MOST
    )
    """Adapters that the fusion creates. Each entry has the options of one adapter, the name of its method under
    "method", and optionally its own "target"."""
    train_parts: bool = True
    """Train the parts together with the fusion. In the paper they are trained separately beforehand, and then
    frozen."""
    mixes: Literal["auto", "inputs", "outputs"] = "auto"
    """The values to mix. "inputs": the module's inputs under each adapter; the module then runs on the mix. "outputs":
    the module's outputs under each adapter. "auto": inputs if all adapters change only the module's input (as at a norm
    that ends a block), else outputs."""
    value: bool = True
    """Use the matrix V; AdapterHub's package calls a fusion without it static."""
    regularizer: NonNegativeFloat = 0.01
    """Factor of |V - I|^2 in the loss."""
    dropout: Share = 0.0
    """Dropout probability of the scores."""


Members = list[list[nn.Module]]
"""The operators of each adapter at one module. A hybrid adapter may have several."""


def of_host(surgeon: Surgeon, names: Sequence[str]) -> list[list[Site]]:
    """Return the modules at which injections of the model act, restricted by the user's `target` and `exclude`. Each
    entry lists one module, followed by the other modules at which the same operators act. Operators that replace
    tensors are skipped.

    Raises:
        UnknownInjection: the model lacks an adapter of that name.
        CompositionError: an adapter acts on more than the outputs of modules.
    """
    there = injections(surgeon.model)
    if unknown := [name for name in names if name not in there]:
        raise UnknownInjection(f"no injection named {unknown[0]!r}; this host has: {', '.join(there) or 'none'}")
    places: dict[str, list[Site]] = {}
    taken: dict[str, list[Site]] = {}
    for injection in [there[name] for name in names]:
        injection.check_combinable()
        for graft in injection.grafts:
            if isinstance(graft.operator, Replacement):
                continue
            paths = [site.module_path for site in graft.holders]
            place = next((taken[path] for path in paths if path in taken), None)
            place = places.setdefault(paths[0], []) if place is None else place
            for site in graft.holders:
                if site.module_path not in taken:
                    taken[site.module_path] = place
                    place.append(_as_called(surgeon, site))
    here = {site.module_path for site in surgeon.chosen([place[0] for place in places.values()])}
    return [place for path, place in places.items() if path in here]


def only_inputs(model: nn.Module, names: Sequence[str], place: Sequence[Site]) -> bool:
    """Return whether the adapters at some modules change only the modules' inputs."""
    there, paths = injections(model), {site.module_path for site in place}
    grafts = [graft for name in names for graft in there[name].grafts]
    here = [graft for graft in grafts if any(site.module_path in paths for site in graft.holders)]
    return all(graft.operator.only_inputs for graft in here)


def _as_called(surgeon: Surgeon, site: Site) -> Site:
    """Return a site for the whole module of a site, so that operators can wrap the module's calls."""
    if site.form == "weight":
        site = surgeon.resolver.site(site.module_path, site.tensor)
    return replace(site, slices=None, meta=surgeon.dry)


def of_parts(surgeon: Surgeon, parts: Sequence[dict[str, Any]]) -> list[tuple[Site, tuple[Site, ...], Members]]:
    """Return one entry for each site at which a part acts: the site, the further sites of its operators, and the
    operators of each part.

    Raises:
        ConfigError: a part needs data or a schedule, or cannot act on single rows of a batch.
        UnsupportedSite: a part acts on a tensor or inside an attention, or parts with the same path act on different
            modules.
    """
    found: dict[str, dict[int, list[Graft]]] = {}
    for index, part in enumerate(parts):
        options = options_of(part)
        method = peftcore.method(part["method"])()
        tags = method.tags
        if method.looks_at_data(options) or tags.scheduled or not tags.per_row:
            raise ConfigError(
                f"{method.name} cannot be a part: parts act only on outputs of modules, and need neither a schedule "
                "nor data"
            )
        for graft in surgeon.collect(str(index), method, options, part.get("target")):
            path = graft.site.path
            if graft.site.form != "activation":
                raise UnsupportedSite(
                    f"{path}: {method.name} acts on a tensor or inside an attention, so it has no module output to "
                    "fuse; fuse installed adapters (adapters=), or exclude it"
                )
            found.setdefault(path, {}).setdefault(index, []).append(graft)
    places = []
    for path, members in found.items():
        grafts = [graft for part in members.values() for graft in part]
        ways = {tuple(site.module_path for site in graft.holders) for graft in grafts}
        if len(ways) > 1:
            raise UnsupportedSite(
                f"{path}: the parts with this path act on different modules; set the same target for all parts, or "
                "exclude it"
            )
        operators: list[list[nn.Module]] = [[graft.operator for graft in part] for part in members.values()]
        places.append((grafts[0].site, grafts[0].holders[1:], operators))
    return places


def outputs_of(
    parts: Sequence[Sequence[Callable[..., Any]]],
    calls: Calls,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, list[Any]]:
    """Return the module's output without adapters, and its output with each part. The second list is empty if no part
    changes the output."""
    base = calls(*args, **kwargs)
    outputs = []
    for part in parts:
        inner: Callable[..., Any] = calls
        for around in part:
            inner = functools.partial(around, inner)
        outputs.append(inner(*args, **kwargs))
    if all(output is base for output in outputs):
        return base, []
    return base, outputs


def first_of(output: Any) -> Tensor:
    """Return a module's output, or its first entry if it is a tuple."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def fused(
    fusion: Any,
    parts: list[list[Callable[..., Any]]],
    module: nn.Module,
    call: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return the output of a module whose adapters are mixed by a fusion. `parts` are the adapters of this fusion. It
    mixes the module's outputs with each part, or the inputs that each part passes to the module."""
    calls = Calls(OneForward(call, module))
    base, outputs = outputs_of(parts, calls, *args, **kwargs)
    if not outputs:
        return base
    if fusion.mixes_inputs:
        inputs = [calls.given(output) for output in outputs]
        return calls.again(base, fusion.combine_inputs(inputs, calls.given(base), first_of(base)))
    return on_first(base, lambda h: fusion.combine([first_of(output) for output in outputs], h))


def mixes_inputs(site: Site, mixes: str, can: bool) -> bool:
    """Return whether the fusion at a site mixes inputs.

    Raises:
        UnsupportedSite: `mixes` is "inputs", but adapters at the site do more than change the module's input.
    """
    if mixes == "inputs" and not can:
        raise UnsupportedSite(
            f"{site.path}: adapters do more here than change a module's input, as they do before a norm that ends a "
            'block; set mixes="outputs" to fuse what modules return'
        )
    return can and mixes != "outputs"


class FusionOperator(Combiner):
    """The attention of one module over adapters, and the adapters that the fusion owns."""

    def __init__(
        self, site: Site, config: AdapterFusionConfig, mixes_inputs: bool, parts: Members | None = None
    ) -> None:
        super().__init__(site)
        self.mixes_inputs = self.only_inputs = mixes_inputs
        width = self.width = site.out_features
        self.parts = nn.ModuleList(nn.ModuleList(part) for part in parts or ())
        self.dropout, self.regularizer = nn.Dropout(config.dropout), config.regularizer
        self.query, self.key = (nn.Parameter(torch.randn(width, width) * 0.02) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(width))
        self.value = nn.Parameter(torch.full((width, width), 1e-6).fill_diagonal_(1.0)) if config.value else None

    def forward(self, *call: Any, **kwargs: Any) -> Any:
        return self.at("activation", nn.Identity())(*call, **kwargs)  # around rows, which a plain matrix has

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        around = [[operator.at(form, module) for operator in part] for part in self.parts]  # type: ignore[attr-defined]  # lists of operators
        return functools.partial(fused, self, around, module)

    def combine(self, outputs: list[Tensor], base: Tensor) -> Tensor:
        return self.combine_inputs(outputs, base, base)

    def combine_inputs(self, inputs: list[Tensor], base: Tensor, output: Tensor) -> Tensor:
        h, u = self.layer.channels_last(base), self.layer.channels_last(output)
        if h.shape[-1] != self.width:
            raise CompositionError(f"a fusion of {self.width} features got an output of shape {list(base.shape)}")
        query, bias, key = self.cast(h, self.query, self.bias, self.key)
        looked = nn.functional.linear(nn.functional.linear(u, query, bias), key.T)  # K' (Q u + q), for all adapters
        z = torch.stack([self.layer.channels_last(each) - h for each in inputs], -2)  # [..., adapters, d]
        scores = self.dropout((z @ looked.unsqueeze(-1)).squeeze(-1))
        (shares,) = self.cast(z, scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)))
        mixed = (shares.unsqueeze(-2) @ z).squeeze(-2)
        if self.value is not None:
            mixed = nn.functional.linear(mixed, *self.cast(h, self.value))
        return self.layer.channels_back(h + mixed.to(h.dtype))


class AdapterFusion(OfMergedParts, Method):
    """Attention over adapters, for each token at each module."""

    name = "adapter_fusion"
    Config = AdapterFusionConfig
    tags = Tags(
        category="multitask",
        paper="2005.00247",
        identity_at_init=False,
        identity_options={"parts": [{**ADAPTER, "up_init_std": 0.0}] * 2},
    )
    learning_rate = LearningRate(5e-5, "arXiv 2005.00247, section 4.1", on="BERT-base, 16 tasks")
    target = ()
    config_version = 2
    former_defaults = ({"mixes": "outputs"},)

    def inject(self, model: nn.Module, config: AdapterFusionConfig, surgeon: Surgeon) -> None:
        adapters = config.adapters or []
        for site, *others in of_host(surgeon, adapters) if adapters else ():
            mixes = mixes_inputs(site, config.at(site.path).mixes, only_inputs(model, adapters, [site, *others]))
            surgeon.graft(site, FusionOperator, config, tuple(others), mixes_inputs=mixes)
        for site, holders, members in of_parts(surgeon, config.parts) if not config.adapters else ():
            can = all(operator.only_inputs for part in members for operator in part)
            mixes = mixes_inputs(site, config.at(site.path).mixes, can)
            surgeon.graft(site, FusionOperator, config, holders, mixes_inputs=mixes, parts=members)

    def trainable(self, model: nn.Module, config: AdapterFusionConfig, injection: AppliedMethod) -> None:
        if config.train_parts:
            super().trainable(model, config, injection)
        for parameter in _own(injection):
            parameter.requires_grad_(True)

    def aux_loss(self, injection: AppliedMethod) -> Tensor | None:
        theirs = super().aux_loss(injection) if injection.config.train_parts else None
        losses = [] if theirs is None else [theirs]
        for each in injection.operators.values():
            if isinstance(each, FusionOperator) and (value := each.value) is not None and value.requires_grad:
                eye = torch.eye(len(value), dtype=value.dtype, device=value.device)
                losses.append(each.regularizer * (value - eye).square().sum())
        return torch.stack(losses).sum() if losses else None

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        own = {"params": [p for p in _own(injection) if p.requires_grad], "lr": lr, **defaults}
        return [each for each in (own, *super().parameter_groups(injection, lr=lr, **defaults)) if each["params"]]

    @staticmethod
    def parameter_count(site: Site, config: AdapterFusionConfig) -> int:
        inside = 0 if config.adapters else OfMergedParts.parameter_count(site, config)
        return (3 if config.value else 2) * site.out_features**2 + site.out_features + inside


def _own(injection: AppliedMethod) -> list[nn.Parameter]:
    fusions = [each for each in injection.operators.values() if isinstance(each, FusionOperator)]
    return [parameter for each in fusions for parameter in each.parameters(recurse=False)]
