"""MoLE: gates over LoRAs that were trained apart.   Wu, Huang and Wei 2024, arXiv 2404.13628.

Equation:
    y = W x + b + sum_e g_e E_e,   E_e = w_e s_e B_e A_e x,   g = softmax(V normalized([E_1 ; ... ; E_N]) / tau)
    loss = -balance * sum_e log(mean of g_e)

Each target module has separate gates. They read the outputs that its LoRAs would add to a token, concatenated and
scaled to length one; V [N, N out] is without bias. tau is trained. w_e are `weights`, 1 by default. The mean in the
loss is over the tokens, without padding, and then over the modules; the loss is smallest if all experts have equal
shares.

The LoRAs in `parts` train together with the gates. In the paper the LoRAs are trained separately beforehand, and then
frozen. To load LoRAs from files, and to train only the gates:

    peftcore.gather(model, "mole", {"dog": 1.0, "cat": 1.0}, train_parts=False).trainable()

LoRAs act as in evaluation: their dropout, for example, is off.

The gates depend on the token, so the method cannot be merged. Parameters: N^2 out + 1 per module with N LoRAs, and
those of the parts.

Start: The rows of V start in random directions with length 0.01, so that all experts have nearly equal shares; tau
starts at 1. New LoRAs in `parts` add nothing, so a fresh adapter with them is the identity.

Differs from the authors' code: The paper makes one choice for a whole sequence, from its flattened tokens, so all
inputs must have one length. Here each token has its own choice. The authors' code (yushuiwx/Mixture-of-LoRA-Experts)
has a different gate: one for all LoRAs of a block of Stable Diffusion, which reads the block's flattened input, without
tau. The loss in that code lacks a gradient, so `balance` is 0 by default.

Use it: `peftcore.apply(model, "mole")`, where there are LoRAs for several subjects or tasks, and data for their
combination; not without data (arrow), nor where one choice for the whole model is enough, made from its hidden states
(xlora).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    ForwardContext,
    LearningRate,
    Method,
    Router,
    Site,
    Surgeon,
    Tags,
    Tap,
    by_row,
    forward_context,
    full_precision,
)
from peftcore_multitask._chosen import first_of
from peftcore_multitask._merging import Members, OfMergedParts, PartsConfig, collected


class MoLEConfig(PartsConfig):
    """Options of MoLE."""

    method: Literal["mole"] = "mole"
    changes_weights: ClassVar[bool] = True
    train_parts: bool = True
    """Train the LoRAs too. In the paper they are trained separately beforehand, and then frozen."""
    balance: NonNegativeFloat = 0.0
    """Factor of the balancing loss."""


class MoLEOperator(Router):
    """The LoRAs of one module, and their gates."""

    def __init__(self, site: Site, config: MoLEConfig, members: Members, balances: Tap) -> None:
        super().__init__(site)
        self.parts = nn.ModuleDict({str(index): graft.operator for index, graft in members.items()})
        self.members, self.balance, self.balances = tuple(members), config.balance, balances
        weights = [1.0] * len(config.parts) if config.weights is None else config.weights
        self.weights = [weights[index] for index in members]
        gate = torch.randn(len(members), len(members) * site.out_features)
        self.gate = nn.Parameter(0.01 * nn.functional.normalize(gate, dim=-1))
        self.temperature = nn.Parameter(torch.ones(1))

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        temperature = values.get("temperature")
        if temperature is not None and not (values.get("gate", temperature).float() / temperature).isfinite().all():
            yield "temperature is zero, or not finite when gates are divided by it"

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., in]
        y = call(x)
        experts = self.experts(x, y)  # [..., N, out]
        gates = self.gates(experts)
        self.noted(gates)
        if self.training and self.balance:
            self.count(gates)
        (shares,) = self.cast(y, gates)
        return y + (shares.unsqueeze(-2) @ experts).squeeze(-2)

    def experts(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the update of each LoRA, ``[..., N, out]``."""
        found = []
        parts: Any = self.parts.values()
        for weight, part in zip(self.weights, parts, strict=True):
            A, B, scale = part.factors()
            A, B = self.cast(y, A, B)
            found.append(weight * scale * (x.to(A.dtype) @ A.mT @ B.mT))
        return torch.stack(found, -2)

    def gates(self, experts: Tensor) -> Tensor:
        """Return the share of each LoRA, ``[..., N]``, in float32 at least."""
        precise = torch.promote_types(self.gate.dtype, torch.float32)
        with full_precision(experts):
            seen = nn.functional.normalize(experts.flatten(-2).to(precise), dim=-1)
            return (seen @ self.gate.to(precise).mT / self.temperature.to(precise)).softmax(-1)

    def count(self, gates: Tensor) -> None:
        """Store the mean gates over tokens without padding."""
        shares, counts, _ = by_row(gates)
        tokens = shares.new_ones(shares.shape[:2]) if counts is None else counts.to(shares.dtype)
        means = (shares * tokens.unsqueeze(-1)).sum((0, 1)) / tokens.sum().clamp(min=1)
        running = forward_context()
        running.check_loss_learns()
        if not running.repeating:
            self.balances.put([*(self.balances.take() or ()), (self.members, means)])


class MoLE(OfMergedParts, Method):
    """Gates over LoRAs that were trained separately, for each token at each module."""

    name = "mole"
    Config = MoLEConfig
    tags = Tags(category="multitask", paper="2404.13628", routes="token")
    learning_rate = LearningRate(
        1e-5,
        "yushuiwx/Mixture-of-LoRA-Experts@8841fe0, dreambooth/run.sh",
        on="Stable Diffusion 1.4, three subjects of DreamBooth",
    )
    target = ()

    def inject(self, model: nn.Module, config: MoLEConfig, surgeon: Surgeon) -> None:
        self.balances = Tap()
        for members in collected(surgeon, config).values():
            site = first_of(members, "MoLE").site
            surgeon.graft(site, MoLEOperator, config, members=members, balances=self.balances)

    def trainable(self, model: nn.Module, config: MoLEConfig, injection: AppliedMethod) -> None:
        if config.train_parts:
            super().trainable(model, config, injection)
        for each in injection.operators.values():
            for parameter in each.parameters(recurse=False):
                parameter.requires_grad_(True)

    def output_loss(self, injection: AppliedMethod, output: Any, call: ForwardContext) -> Tensor | None:
        of_experts: dict[int, list[Tensor]] = {}
        for members, means in self.balances.take() or ():
            for index, mean in zip(members, means.unbind(), strict=True):
                of_experts.setdefault(index, []).append(mean)
        if not of_experts:
            return None
        means_of = torch.stack([torch.stack(means).mean() for means in of_experts.values()])
        logs = means_of.clamp(min=torch.finfo(means_of.dtype).tiny).log()
        return -injection.config.balance * logs.sum()

    @staticmethod
    def parameter_count(site: Site, config: MoLEConfig) -> int:
        return len(config.parts) ** 2 * site.out_features + 1 + OfMergedParts.parameter_count(site, config)
