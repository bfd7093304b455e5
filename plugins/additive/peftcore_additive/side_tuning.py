"""Side-tuning: a small network beside the model, blended with what the model makes.   Zhang et al. 2019,
arXiv 1912.13503 (code: jozhang97/side-tuning).

For models of tokens alone: pictures, for which the authors' side networks are convolutions, are not here.

Equation:
    R = g B(x) + (1 - g) S(x),   g = sigmoid(a)

By `merge` it is the sum or the product of B and S, too, as in the code. B are the model's features after its last norm,
or after its last block if it lacks one; S is a side network over the same tokens, which does not read the model's
states. The inside of the model is unchanged and gets no gradient, so training a task does not damage earlier tasks.
`target` names another place; of several modules the last one counts. With several injections each one blends the result
of the injections before it.

S is a guest: of the model's own class and config, with `layers` layers and other `sizes`, and a projection where its
width is another. It shares the model's token table where it can.

Parameters: those of the guest, and 1.

Start: a starts at 0: half of each, no identity. The side network starts from scratch, or from a trained network:
``injection.shared["guest"].take(network)``.

Differs from the authors' code: The authors first train the side network to reproduce the model's features. A schedule
of g, FiLM, MLP, and links to the side networks of earlier tasks are not here.

Use it: `peftcore.apply(model, "side_tuning")`, where the model must stay unchanged and training must be cheap, or for a
sequence of tasks; not where a task needs other features early in the model (`lora`). `lst` is its kin that reads the
model's blocks, `shadow` the one that corrects what they read.
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
    """Layers of the side network."""
    sizes: dict[str, PositiveInt] = Field(default_factory=dict)
    """Other sizes of the side network, by the names of the model's config: ``{"intermediate_size": 256}``."""
    own_table: bool = False
    """Give the side network a separate token table, which trains. It always has one if its width differs from the
    model's."""
    merge: Literal["alpha", "sum", "product"] = "alpha"
    """The way in which the side network's and the model's states are combined."""
    alpha: FiniteFloat = 0.0
    """Start of a; sigmoid(a) is the model's share."""


class Blend(nn.Module):
    """A learned share of the model's states."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))

    def forward(self, base: Tensor, side: Tensor) -> Tensor:
        """Return the mix of both, each ``[batch, tokens, d]``."""
        share = torch.sigmoid(self.alpha)
        return share * base + (1 - share) * side


FIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "product": torch.mul}
"""Merges without parameters."""


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
    """A small network of the model's own class in parallel with it, blended with its last states."""

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
