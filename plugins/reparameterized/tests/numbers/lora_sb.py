"""What LoRA-SB's authors make of the gradients of a small model: the first step, and factors for it.
``python -m peftcore.testing.freeze lora_sb.py CHECKOUT``."""

import importlib
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import ModelOutput

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("others", "CERT-Lab/lora-sb", "4feb81c", "utils/initialization_utils.py")
VERSIONS = ("torch", "peft", "accelerate")
RATE, RANK, ALPHA = 0.01, 2, 2


class Small(nn.Module):
    """One linear layer, and a loss."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return ModelOutput(loss=(self.layer(input_ids) - labels).square().mean())


def numbers(checkout: Path) -> dict[str, list[Any]]:
    """Returns the weight, the batches, the authors' first step and what their factors make of it."""
    module = load(checkout / SOURCE.script, root=checkout)
    gradients = importlib.import_module("utils.gradient_utils")
    torch.manual_seed(6)  # two directions are well apart from the others, which their fast decomposition wants
    model, x, y = Small(), torch.randn(6, 5), torch.randn(6, 4)
    batches = DataLoader([{"input_ids": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=2)
    found = {"weight": model.layer.weight, "bias": model.layer.bias, "x": x, "y": y}
    found = {name: tensor.tolist() for name, tensor in found.items()}
    steps = gradients.estimate_and_process_grads_torch(model, batches, RATE, num_samples=6)
    found["step"] = steps["layer.weight"].tolist()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"])
    adapted = peft.LoraModel(model, config, "default")
    options = yaml.safe_load((checkout / "config" / "reconstruct_config.yaml").read_text())
    options["svd"]["rank"] = RANK
    named = {f"model.{name}": each for name, each in steps.items()}
    module.find_and_initialize_grad(adapted, {"default": config}, "default", "svd", options, None, named)
    layer = adapted.model.layer
    A, B, R = (each.weight for each in (layer.lora_A.default, layer.lora_B.default, layer.default_lora_latent_mapping))
    found |= {"A": A.tolist(), "B": B.tolist(), "R": R.tolist()}
    found["output"] = layer(x).tolist()
    return found
