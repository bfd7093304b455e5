"""The same adapter twice: by peft and by peftcore, on copies of one host, with equal settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import peft
import torch
from torch import nn

import peftcore
from benchmarks.hosts import PROJECTIONS


@dataclass(frozen=True)
class Pair:
    """One method, with its settings in both libraries."""

    method: str
    config: Callable[..., peft.PeftConfig]
    theirs: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    low_memory: bool = False
    """Ours takes the way that needs least memory."""

    def ours_on(self, model: nn.Module, target: list[str] = PROJECTIONS, **wishes: Any) -> nn.Module:
        """Return the host with our operators, no longer at their start."""
        injection = peftcore.apply(model, self.method, target=target, **{**self.ours, **wishes})
        injection.low_memory = self.low_memory
        moved(injection.parameters())
        return model

    def theirs_on(self, model: nn.Module, target: list[str] = PROJECTIONS, name: str = "default") -> Any:
        """Return the host with peft's adapter, no longer at its start."""
        adapted = peft.get_peft_model(model, self.settings(target), adapter_name=name)
        moved(parameter for parameter in adapted.parameters() if parameter.requires_grad)
        return adapted

    def settings(self, target: list[str] = PROJECTIONS) -> peft.PeftConfig:
        """Return peft's configuration."""
        return self.config(target_modules=target, **self.theirs)


def moved(parameters: Any) -> None:
    """Move parameters away from their start, at which many products are zero."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.01)


LORA = Pair("lora", peft.LoraConfig, {"r": 8, "lora_alpha": 8}, {"rank": 8, "alpha": 8.0})
DORA = Pair("dora", peft.LoraConfig, {"r": 8, "lora_alpha": 8, "use_dora": True}, {"rank": 8, "alpha": 8.0})
BOFT = Pair(
    "boft",
    peft.BOFTConfig,
    {"boft_block_size": 8, "boft_n_butterfly_factor": 2},
    {"block_size": 8, "factors": 2},
)
PAIRS: Mapping[str, Pair] = {
    "lora": LORA,
    "lora, dropout 0.1": Pair(
        "lora",
        peft.LoraConfig,
        {"r": 8, "lora_alpha": 8, "lora_dropout": 0.1},
        {"rank": 8, "alpha": 8.0, "dropout": 0.1},
    ),
    "dora": DORA,
    "dora, low memory": replace(DORA, low_memory=True),
    "oft": Pair("oft", peft.OFTConfig, {"oft_block_size": 32}, {"block_size": 32, "series": 5}),
    "oft, exact": Pair("oft", peft.OFTConfig, {"oft_block_size": 32, "use_cayley_neumann": False}, {"block_size": 32}),
    "boft": BOFT,
    "boft, low memory": replace(BOFT, low_memory=True),
    "hra": Pair("hra", peft.HRAConfig, {"r": 8}, {"rank": 8}),
    "loha": Pair("loha", peft.LoHaConfig, {"r": 8, "alpha": 8}, {"rank": 8, "alpha": 8.0}),
    "lokr": Pair("lokr", peft.LoKrConfig, {"r": 8, "alpha": 8}, {"rank": 8, "alpha": 8.0}),
    "vera": Pair("vera", peft.VeraConfig, {"r": 256}, {"rank": 256}),
    "fourierft": Pair("fourierft", peft.FourierFTConfig, {"n_frequency": 1000}, {"n_frequency": 1000}),
    "randlora": Pair("randlora", peft.RandLoraConfig, {"r": 32}, {"rank": 32}),
    "adalora": Pair(
        "adalora",
        peft.AdaLoraConfig,
        # Without a task peft goes round the forward that adds the method's own loss, which ours always adds.
        {"init_r": 12, "target_r": 8, "lora_alpha": 8, "total_step": 1000, "task_type": "CAUSAL_LM"},
        {"rank": 12, "target_rank": 8, "alpha": 8.0},
    ),
}

Step = Callable[[], object]


def training_step(model: nn.Module, ids: torch.Tensor, autocast: bool = False) -> Step:
    """Make a training step: forward, and backward to all that is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    return step


def limit_step(model: Any, ids: torch.Tensor, autocast: bool = False) -> Step:
    """Make the step that no adapter can be faster than: the frozen host, forward, and backward through activations
    only."""
    model.requires_grad_(False).train()
    rows = model.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> None:
        rows.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(inputs_embeds=rows, labels=ids).loss
        loss.backward()

    return step
