"""What LoRA-One's authors make of the gradients of a small model: ``python -m peftcore.testing.freeze lora_one.py
CHECKOUT``.

Their script wants a GPU, and at least 512 directions: here it stays on the CPU and takes as many as there are.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "YuanheZ/LoRA-One", "01bba05", "run_exp.py")
VERSIONS = ("torch", "peft")
ABSENT = ("hydra", "omegaconf", "wandb", "data", "utils", "datasets")
RANK, ALPHA, GAMMA = 2, 3, 128


class Options(dict[str, Any]):
    """Options as hydra has them."""

    __getattr__ = dict.__getitem__


class Small(nn.Module):
    """One linear layer, and a loss."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return ModelOutput(loss=(self.layer(x) - y).square().mean())


def numbers(checkout: Path) -> dict[str, list[Any]]:
    """Returns the weight, the batches, and what their factors make of them."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    torch.manual_seed(0)
    model, x, y = Small(), torch.randn(6, 5), torch.randn(6, 4)
    found: dict[str, list[Any]] = {"weight": model.layer.weight.tolist(), "bias": model.layer.bias.tolist()}
    found |= {"x": x.tolist(), "y": y.tolist()}
    data = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    approximated = torch.svd_lowrank
    with (
        patch.object(Tensor, "cuda", lambda self: self),
        patch.object(torch, "svd_lowrank", lambda A, q, niter: approximated(A, min(q, *A.shape), niter)),
    ):
        gradients = module.estimate_gradient(model, data, 2)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=["layer"])
        adapted = peft.get_peft_model(model, config)
        init = Options(mode="gradient", direction="LoRA-One", scale="stable", stable_gamma=GAMMA, dtype="fp32")
        layer = adapted.base_model.model.layer
        module.reinit_lora_modules("base_model.model.layer", layer, init, {}, named_grads=gradients)
    found["gradient"] = gradients["layer.weight"].tolist()
    found |= {"A": layer.lora_A.default.weight.tolist(), "B": layer.lora_B.default.weight.tolist()}
    found["output"] = layer(x).tolist()
    return found
