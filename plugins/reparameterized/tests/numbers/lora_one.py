"""What LoRA-One's authors make of the gradients of a small model, what trains then, and their options:
``python -m peftcore.testing.freeze lora_one.py CHECKOUT``.

Their script wants a GPU, and at least 512 directions: here it stays on the CPU and takes as many as there are.
"""

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
import yaml
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


def started(checkout: Path) -> tuple[Any, dict[str, list[Any]], list[int]]:
    """Returns a model with their adapter; the tensors that it had before, the batches, and their gradient; and how many
    steps their approximation was told to make."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    torch.manual_seed(0)
    model, x, y = Small(), torch.randn(6, 5), torch.randn(6, 4)
    found: dict[str, list[Any]] = {"weight": model.layer.weight.tolist(), "bias": model.layer.bias.tolist()}
    found |= {"x": x.tolist(), "y": y.tolist()}
    data = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    approximated, steps = torch.svd_lowrank, []

    def approximation(A: Tensor, q: int, niter: int) -> Any:
        steps.append(niter)
        return approximated(A, min(q, *A.shape), niter)

    with patch.object(Tensor, "cuda", lambda self: self), patch.object(torch, "svd_lowrank", approximation):
        gradients = module.estimate_gradient(model, data, 2)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=["layer"])
        adapted = peft.get_peft_model(model, config).base_model.model
        init = Options(mode="gradient", direction="LoRA-One", scale="stable", stable_gamma=GAMMA, dtype="fp32")
        module.reinit_lora_modules("base_model.model.layer", adapted.layer, init, {}, named_grads=gradients)
    found["gradient"] = gradients["layer.weight"].tolist()
    return adapted, found, steps


def numbers(checkout: Path) -> dict[str, list[Any]]:
    """Returns the weight, the batches, the gradient, and what comes out of the layer."""
    adapted, found, _ = started(checkout)
    return found | {"output": adapted.layer(torch.tensor(found["x"])).tolist()}


def start(checkout: Path) -> dict[str, list[Any]]:
    """Returns what the factors start from, of the batches in `numbers`."""
    layer = started(checkout)[0].layer
    return {"A": layer.lora_A.default.weight.tolist(), "B": layer.lora_B.default.weight.tolist()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns what trains of the layer ``[4, 5]`` at rank 2, by name: how many numbers."""
    return {name: each.numel() for name, each in started(checkout)[0].named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of the first command on their page, with the files that it names, and the steps."""
    command = re.search(r"srun python run_exp.py (.*)", (checkout / "README.md").read_text())
    assert command
    told = dict(re.findall(r"\+*([\w.]+)=(\S+)", command[1]))
    kept = {
        group: yaml.safe_load((checkout / "conf" / group / f"{told[group]}.yaml").read_text())
        for group in ("peft", "init")
    }
    for key, value in told.items():
        group, _, option = key.partition(".")
        if option and group in kept:
            kept[group][option] = yaml.safe_load(value)
    (iterations,) = started(checkout)[2]
    found = {ours: kept["peft"][theirs] for ours, theirs in (("rank", "lora_r"), ("alpha", "lora_alpha"))}
    found |= {"dropout": kept["peft"]["lora_dropout"], "gamma": kept["init"]["stable_gamma"], "iterations": iterations}
    return found | {"scaling": "sqrt_rank" if kept["peft"]["use_rslora"] else "rank"}
