"""Side-tuning: a small network in parallel with the model, blended with the model's features.   Zhang et al. 2019,
arXiv 1912.13503 (code: jozhang97/side-tuning).

Only for models of tokens: pictures, for which the authors' side networks are convolutions, are not here.

Equation:
    R = g B(x) + (1 - g) S(x),   g = sigmoid(a)

With `merge`, R can also be the sum or the product of B and S, as in the authors' code. B are the model's features after
its last norm, or after its last block if it lacks one; S is a side network over the same tokens, which does not read
the model's states. The model's layers are unchanged and get no gradient, so training a task does not damage earlier
tasks. With `target` you can choose another module whose output is blended; if several modules match, the last one is
used. Each of several injections blends the result of the previous injections.

S has the model's own class and config, with `layers` layers and other `sizes`, and a projection if its width differs.
It shares the model's token table if the widths are equal.

Parameters: those of the side network, and 1.

Start: a starts at 0, so R is the mean of both: no start is an identity. The side network starts from random weights, or
from a trained network: ``injection.shared["guest"].take(network)``.

Differs from the authors' code: The authors first train the side network to reproduce the model's features. Their
schedule of g, their merges by FiLM and by an MLP, and the links to side networks of earlier tasks are not implemented.

Use it: `peftcore.apply(model, "side_tuning")`, where the model must stay unchanged and training must be cheap, or for a
sequence of tasks; not where a task needs other features in early layers (`lora`). The similar `lst` reads the states of
the model's blocks, and `shadow` corrects the inputs of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, FiniteFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    GuestOperator,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    TokenStacks,
    guest_network,
    on_first,
    with_blocks,
)
from peftcore.errors import MissingContext, SequenceError


class SideTuningConfig(MethodConfig):
    """Options of side-tuning."""

    overridable = ()

    method: Literal["side_tuning"] = "side_tuning"
    layers: PositiveInt = 1
    """Number of layers of the side network."""
    sizes: dict[str, PositiveInt] = Field(default_factory=dict)
    """Sizes of the side network that differ from the model's, by the names in the model's config:
    ``{"intermediate_size": 256}``."""
    own_table: bool = False
    """Give the side network a separate, trained token table. The side network always has one if its width differs from
    the model's."""
    merge: Literal["alpha", "sum", "product"] = "alpha"
    """How the states of the model and of the side network are combined: by a learned share ("alpha"), their sum, or
    their product."""
    alpha: FiniteFloat = 0.0
    """The start of a; sigmoid(a) is the share of the model's features."""


class Blend(nn.Module):
    """Blends the model's and the side network's states with a learned share."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))

    def forward(self, base: Tensor, side: Tensor) -> Tensor:
        """Return the mix of the model's and the side network's states, each ``[batch, tokens, d]``."""
        share = torch.sigmoid(self.alpha)
        return share * base + (1 - share) * side


FIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "product": torch.mul}
"""Functions that combine the states of model and side network without parameters, by the values of `merge`."""


class BlendOperator(Operator):
    """Combines a module's output with the states of the side network."""

    def __init__(self, site: Site, merge: Callable[[Tensor, Tensor], Tensor] | Shared, states: Tap) -> None:
        super().__init__(site)
        self.merge, self.states = merge, states

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return on_first(call(x, *args, **kwargs), self._blended)

    def _blended(self, base: Tensor) -> Tensor:
        side = self.states.get()  # [batch, tokens, d]
        if side is None:
            raise MissingContext(
                "a part of the model was called by itself; call the whole model, whose tokens the side network reads"
            )
        if side.shape != base.shape:
            raise SequenceError(
                f"the model's states have shape {tuple(base.shape)}, but the side network's have {tuple(side.shape)}; "
                "target a module that keeps one state for each token"
            )
        merge = self.merge.module if isinstance(self.merge, Shared) else self.merge
        blended: Tensor = merge(base.to(side.dtype), side)
        return blended.to(base.dtype)


class SideTuning(Method):
    """A small network of the model's own class, which runs in parallel with the model; its output is blended with the
    model's last states."""

    name = "side_tuning"
    Config = SideTuningConfig
    tags = Tags(category="additive", paper="1912.13503", identity_at_init=False)
    learning_rate = LearningRate(
        1e-3, "jozhang97/side-tuning@dea3456, configs/icifar_cfg.py", on="ResNet-44, CIFAR-100", optimizer="Adam"
    )
    target = ("block", "norm.final")

    def inject(self, model: nn.Module, config: SideTuningConfig, surgeon: Surgeon) -> None:
        sites = with_blocks(surgeon)
        stack, last = TokenStacks(surgeon).around(sites), sites[-1]
        if (last.role or "").startswith("norm"):  # which is called as other modules are
            last = replace(last, form="activation")
        sizes = {**config.sizes, "num_hidden_layers": config.layers}
        guest = guest_network(surgeon, stack, sizes, config.own_table, encoders=True)
        states = Tap(until_backward=True)
        merge = FIXED.get(config.merge) or surgeon.own("blend", lambda: Blend(config.alpha))
        surgeon.graft(stack, GuestOperator, guest=guest, states=states)
        surgeon.graft(last, BlendOperator, merge=merge, states=states)

    @staticmethod
    def parameter_count(site: Site, config: SideTuningConfig) -> int:
        return 0  # the side network and its share belong to no site
