"""Child-Tuning_D: the weights that matter most to the task train.   Xu et al. 2021, arXiv 2109.05687.

Equation:
    F = mean over the batches of (dL/dW)^2,   mask = F >= its (1 - share) quantile,   G <- mask * G

F is the diagonal of the Fisher information, computed once before training (``data=``); there is one quantile for all
weights of the blocks. As in the authors' code, the gradient of each tensor is clipped before it is squared, the
gradients of F are computed in training mode, all parameters outside of the blocks train without a mask, and weight
decay still acts on masked weights; the paper does not mention these details. If `target` is set, only the target trains
with a mask, and only modules in `train` train without one. The optimizer masks the gradients, so train with
``injection.optimizer(...)``.

Parameters: all; in the blocks only the share `share` of them changes.

Start: Trained tensors start at the model's values. A fresh adapter is the identity.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "child_tuning_d", data=batches)`, to fine-tune on little data without forgetting; it
costs a backward pass over the data.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    Batches,
    GradientRule,
    LearningRate,
    Method,
    MethodConfig,
    Site,
    Surgeon,
    Tags,
)
from peftcore_selective._fisher import squared_gradients


class ChildTuningDConfig(MethodConfig):
    """Options of Child-Tuning_D."""

    method: Literal["child_tuning_d"] = "child_tuning_d"
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Share of the weights that train."""
    max_grad_norm: PositiveFloat | None = 1.0
    """The norm to which the gradient of each tensor is clipped before it is squared. None: gradients are not
    clipped."""
    training: bool = True
    """Compute F in training mode, with dropout."""
    others: bool = True
    """Train all parameters outside of the blocks, without a mask: embeddings, final norms, poolers, heads."""


class ChildMask(GradientRule):
    """Zeroes the gradients outside of the child network."""

    def __init__(self, masks: dict[Tensor, Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def project(self, grad: Tensor, param: nn.Parameter) -> Tensor:
        mask = self.masks.get(param)
        return grad if mask is None else grad * mask


class ChildTuningD(Method):
    """Train the child network of a task: the weights with the largest Fisher information."""

    name = "child_tuning_d"
    Config = ChildTuningDConfig
    tags = Tags(
        category="selective",
        paper="2109.05687",
        mergeable=True,
        needs_data=True,
    )
    learning_rate = LearningRate(4e-5, "RunxinXu/ChildTuning@d0d8655, run.sh", on="BERT-large, RTE")
    target = ("all-linear", "norm", "norm.inner")
    config_version = 2
    former_defaults = ({"training": False, "others": False},)

    def inject(self, model: nn.Module, config: ChildTuningDConfig, surgeon: Surgeon) -> None:
        values = {value for site in surgeon.sites() for value in surgeon.train(site.module_path)}
        for value in values:
            value.register_buffer("mask", torch.ones_like(value.value, dtype=torch.bool))
        for site in surgeon.at("*") if surgeon.wishes.target is None and config.others else ():
            for tensor in site.tensors():
                if not site.missing(tensor):
                    surgeon.replace(site.at(tensor))

    def calibrate(self, model: nn.Module, data: Batches, config: ChildTuningDConfig, injection: AppliedMethod) -> None:
        model.train(config.training)
        torch.manual_seed(0)  # what dropout drops is the same each time; the caller puts the generator back
        values = [value for value, _ in _masked(injection)]
        fisher = list(squared_gradients(values, data, config.max_grad_norm).values())
        threshold = _quantile(torch.cat([each.flatten() for each in fisher]), 1 - config.share)
        for (_, mask), information in zip(_masked(injection), fisher, strict=True):
            mask.copy_(information >= threshold)

    def gradient_rule(self, injection: AppliedMethod) -> GradientRule:
        return ChildMask(dict(_masked(injection)))

    @staticmethod
    def parameter_count(site: Site, config: ChildTuningDConfig) -> int:
        return site.numel


def _masked(injection: AppliedMethod) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the trained values and their masks."""
    operators = [graft.operator for graft in injection.grafts if graft.by_method]
    return [
        (operator.get_parameter("value"), mask) for operator in operators for mask in operator.buffers(recurse=False)
    ]


def _quantile(values: Tensor, share: float) -> Tensor:
    """Return the smallest value above the given share of the values. A comparison ``>=`` with it selects the same
    values as one with an interpolated quantile. The number of values is not limited."""
    return values.kthvalue(math.ceil((len(values) - 1) * share) + 1).values
