"""For each check of the host at work a method that fails it, and it only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from mutant_base import NOT_MERGEABLE, TAGS, Entry, Small, SmallConfig, Unmergeable, mutant
from torch import Tensor, nn

from peftcore import Injection
from peftcore.author import (
    Method,
    MethodConfig,
    SequenceOperator,
    SequenceSite,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
    forward_context,
    low_rank,
)
from peftcore.forward.context.context import repeating
from peftcore.forward.sequence.sequence_order import Order
from peftcore.registry.plugins import registry
from peftcore.testing import Case
from peftcore.testing.probes import ByKeyword


class DividesByNorms(WeightOperator):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site)
        self.length = nn.Parameter(self._norm(site.weight(), site.in_features))

    @staticmethod
    def _norm(weight: Tensor, inputs: int) -> Tensor:
        return torch.linalg.vector_norm(weight.detach().double().flatten(1), dim=1)

    def forward(self, weight: Tensor) -> Tensor:
        gain = self.length / self._norm(weight, 1)
        return weight * gain.view(-1, *[1] * (weight.dim() - 1))


class DetachesA(Small):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(x, A.detach()), B, 1.0)


class ForgetsTheScale(Small):
    """Its factors are right, and linear layers are computed from them."""

    @low_rank
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return y + self.layer.mix(self.layer.apply(x, A), B)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A, self.B, 2.0

    def merged(self, weight: Tensor) -> Tensor:
        return weight + 2 * (self.B @ self.A.flatten(1)).view(weight.shape)


class WritesBase(Small):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.host = [site.module]

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.host[0].weight.data.mul_(1 + 2**-23)
        return super().forward(call, x)


class StrongerInTraining(Small):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(x, A), B, 1.01 if self.training else 1.0)


class DropoutConfig(SmallConfig):
    dropout: float = 0.0
    """Probability of dropping inputs."""


class AlwaysDrops(Small):
    def __init__(self, site: Site, config: DropoutConfig) -> None:
        super().__init__(site, config)
        self.p = config.dropout

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(F.dropout(x, self.p) if self.p else x, A), B, 1.0)


class DrawsUntold(Small):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.dropout = 0.1

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, F.dropout(self.layer.apply(x, A), self.dropout, self.training), B, 1.0)


class HalfAGradient(Small):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, (self.A + self.A.detach()) / 2, self.B)
        return self.layer.add(y, self.layer.apply(x, A), B, 1.0)


class Deaf(Small):
    def train(self, mode: bool = True) -> Deaf:
        return self


class AddsInFloat32(Unmergeable):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        low = self.layer.apply(x.to(self.A.dtype) if x.is_floating_point() else x, self.A)
        return y + self.layer.add(torch.zeros_like(y, dtype=low.dtype), low, self.B.to(low.dtype), 1.0)


class LeavesAutocast(Small):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        dtype = x.dtype if x.is_floating_point() else y.dtype
        with torch.autocast("cpu", enabled=False):
            low = self.layer.apply(x, self.A.to(dtype))
            return y + self.layer.add(torch.zeros_like(y, dtype=dtype), low, self.B.to(dtype), 1.0)


class StaysBehind(Small):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(x, A), B * torch.ones(B.shape[-1], dtype=B.dtype), 1.0)


class OtherInBackward(Small):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        low = self.layer.apply(x, A)
        state = forward_context().state
        alone = state is not None and len(state.injections) == 1
        if alone and not torch.compiler.is_compiling() and repeating():
            low = low * 2
        return self.layer.add(y, low, B, 1.0)


class BuildsWeights(Small):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return y + self.layer.apply(x, (B @ A.flatten(1)).view(-1, *A.shape[1:]))


class _Caching(Small):
    """Keeps the product of the factors where `keeps` says so, as long as `key` stays."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.cached: list[Any] = [None, None]

    def key(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return self.A._version, self.B._version, dtype

    def keeps(self) -> bool:
        return False

    def uses(self) -> bool:
        return False

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(call, x)
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        if self.keeps() and self.cached[0] != self.key(y.dtype):
            self.cached = [self.key(y.dtype), (B @ A.flatten(1)).view(-1, *A.shape[1:])]
        if self.uses() and self.cached[0] == self.key(y.dtype):
            return y + self.layer.apply(x, self.cached[1])
        return self.layer.add(y, self.layer.apply(x, A), B, 1.0)


class CachesByVersion(_Caching):
    def keeps(self) -> bool:
        return not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    uses = keeps


class CachesInInference(_Caching):
    def key(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return (*super().key(dtype), self.A.data_ptr(), self.B.data_ptr())

    def keeps(self) -> bool:
        return torch.is_inference_mode_enabled()

    def uses(self) -> bool:
        return True


class CentersBatch(Unmergeable):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        low = self.layer.apply(x, A)
        return self.layer.add(y, low - low.flatten(0, -2).mean(0), B, 1.0)


class DividesByLength(Unmergeable):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(x, A), B, 1.0 / x.shape[min(1, x.dim() - 1)])


class NotOnKeywords(Case):
    """No operator can tell how its module was called, so the host is broken instead."""

    def apply(self, model: nn.Module, **changes: Any) -> Injection:
        injection = super().apply(model, **changes)
        if isinstance(model, ByKeyword):
            model.layer.register_forward_hook(lambda module, args, output: output * 0)
        return injection


class LosesState(Small):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.scale = 1.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "scale": 0.5}

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(x, A), B, self.scale)


class RemembersInput(Small):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.box: list[Tensor | None] = [None]

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        self.box[0] = x
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        low = self.layer.apply(x if self.box[0] is None else self.box[0], A)
        self.box[0] = None
        return self.layer.add(y, low, B, 1.0)


class BusyInForward(Small):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.busy: set[int] = set()

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(call, x)
        thread = threading.get_ident()
        if thread in self.busy:
            return call(x)
        self.busy.add(thread)
        y = super().forward(call, x)
        self.busy.discard(thread)
        return y


class CallsHooks(Small):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            registry().hook.peftcore_methods()
        return super().forward(call, x)


@torch.compiler.disable
def _not_compiled(x: Tensor) -> Tensor:
    return x


class BreaksGraphs(Small):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return super().forward(call, _not_compiled(x))


class LeavesExportOut(Small):
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x) if torch.compiler.is_exporting() else super().forward(call, x)


class BeforeThePadding(SequenceOperator):
    """Puts two rows in front of all that there is."""

    def __init__(self, site: SequenceSite, config: MethodConfig) -> None:
        super().__init__(site, 2)
        self.prompt = nn.Parameter(torch.randn(2, self.width))

    def rows(self, embeds: Tensor) -> Tensor:
        return self.prompt

    def _order(self, mask: Any, batch: int, tokens: int) -> Order:
        return Order(2)


def _in_front(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    for site in surgeon.sites():
        surgeon.sequence(site, BeforeThePadding, config)


def _on_mlp(name: str, *args: Any, **kwargs: Any) -> Entry:
    return mutant(name, *args, **kwargs), "mlp"


MUTANTS: dict[str, Entry] = {
    "zero_rows_stay_finite": _on_mlp(
        "divides_by_norms", DividesByNorms, parameter_count=lambda site, config: site.out_features
    ),
    "every_trainable_tensor_learns": _on_mlp("detaches", DetachesA),
    "fused_kernels_equal_the_plain_forward": _on_mlp(
        "forgets_the_scale", ForgetsTheScale, tags=replace(TAGS, low_rank=True)
    ),
    "training_leaves_the_base_alone": _on_mlp("writes_base", WritesBase),
    "the_effect_is_the_same_in_training_and_evaluation": _on_mlp("stronger_in_training", StrongerInTraining),
    "draws_are_declared": _on_mlp("draws_untold", DrawsUntold),
    "gradients_are_those_of_the_forward": _on_mlp("half_a_gradient", HalfAGradient),
    "dropout_acts_in_training_only": _on_mlp("always_drops", AlwaysDrops, config=DropoutConfig),
    "operators_follow_the_training_mode": _on_mlp("deaf", Deaf),
    "low_precision_hosts_keep_their_dtype": _on_mlp("adds_in_float32", AddsInFloat32, tags=NOT_MERGEABLE),
    "autocast_decides_the_dtype": _on_mlp("leaves_autocast", LeavesAutocast),
    "it_works_where_its_host_is": _on_mlp("stays_behind", StaysBehind),
    "gradient_checkpointing_changes_nothing": _on_mlp("other_in_backward", OtherInBackward),
    "effective_weights_do_not_outlive_their_use": _on_mlp("builds_weights", BuildsWeights),
    "changes_show_at_once": _on_mlp("caches_by_version", CachesByVersion),
    "inference_mode_leaves_nothing_behind": _on_mlp("caches_in_inference", CachesInInference),
    "rows_stay_apart": _on_mlp("centers_batch", CentersBatch, tags=replace(NOT_MERGEABLE, per_row=False)),
    "padding_on_the_left_does_not_matter": (
        mutant(
            "before_the_padding",
            tags=Tags(category="additive", paper="2104.08691", identity_at_init=False, per_row=False),
            target="stack",
            inject=_in_front,
            parameter_count=lambda site, config: 2 * site.out_features,
        ),
        "mistral",
    ),
    "leading_dimensions_do_not_matter": _on_mlp("divides_by_length", DividesByLength, tags=NOT_MERGEABLE),
    "inputs_by_keyword_are_seen": (mutant("not_on_keywords"), "mlp", NotOnKeywords),
    "copies_behave_the_same": _on_mlp("loses_state", LosesState),
    "threads_do_not_meet": _on_mlp("remembers_input", RemembersInput),
    "an_exception_in_forward_leaves_nothing": _on_mlp("busy_in_forward", BusyInForward),
    "no_hook_runs_in_forward": _on_mlp("calls_hooks", CallsHooks),
    "compiled_equals_eager": (mutant("breaks_graphs", BreaksGraphs), "bert"),
    "exported_equals_eager": _on_mlp("leaves_export_out", LeavesExportOut),
}
