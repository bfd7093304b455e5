"""What LoRA-XS' authors make of a matrix, what it computes then, in float32, what it starts from and trains, and their
options: ``python -m peftcore.testing.freeze lora_xs.py CHECKOUT``."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from torch import nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "MohammadrezaBanaei/LoRA-XS", "e50b1a8", "utils/initialization_utils.py")
VERSIONS = ("torch", "peft", "scikit-learn")


def options(checkout: Path) -> Any:
    return yaml.safe_load((checkout / "config" / "reconstruct_config.yaml").read_text())


def started(checkout: Path, base: nn.Module, rank: int) -> nn.Module:
    """Returns a model whose only layer has their adapter, at alpha 3."""
    module = load(checkout / SOURCE.script, root=checkout)
    config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=["0"])
    model, told = peft.LoraModel(base, config, "default"), options(checkout)
    told["svd"]["rank"] = rank
    module.find_and_initialize(model.model, {"default": config}, "default", "svd", told, None)
    return model.model


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, list[list[float]]]:
    """Returns the factors, the output for a vector, and the merged weight, at rank 2."""
    base = nn.Sequential(nn.Linear(4, 3, bias=False))
    base[0].weight.copy_(torch.tensor([[0.9, -0.4, 0.1, 0.3], [0.2, 0.7, -0.5, 0.1], [-0.3, 0.2, 0.4, 0.6]]))
    layer = started(checkout, base, 2)[0]
    layer.default_lora_latent_mapping.weight.copy_(torch.tensor([[0.5, -0.2], [0.3, 0.4]]))
    output, update = layer(torch.tensor([[1.0, 2.0, -1.0, 0.5]])), layer.get_delta_weight("default")
    found = {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight, "output": output}
    found["merged"] = layer.weight + update
    return {name: tensor.tolist() for name, tensor in found.items()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns A and B of the weight ``sin(1), sin(2), ...``, ``[6, 5]``, at rank 2, and what R is drawn from, at rank
    200."""
    base = nn.Sequential(nn.Linear(5, 6, bias=False))
    base[0].weight.data.copy_(torch.arange(1.0, 31).sin().view(6, 5))
    small, large = (started(checkout, *each)[0] for each in ((base, 2), (nn.Sequential(nn.Linear(200, 200)), 200)))
    factors = {"A": small.lora_A.default.weight.tolist(), "B": small.lora_B.default.weight.tolist()}
    return {**factors, "R": drawn(large.default_lora_latent_mapping.weight)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train, by the name of the module, of a layer ``[6, 5]`` at rank 2."""
    model = started(checkout, nn.Sequential(nn.Linear(5, 6)), 2)
    return {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the scale's numerator of the script for GLUE, and the decomposition's steps, of their configuration."""
    transformers.utils.send_example_telemetry = None  # since removed
    arguments = load(checkout / "main_glue.py", absent=("datasets", "evaluate")).ModelArguments
    return {"alpha": arguments.lora_alpha, "iterations": options(checkout)["svd"]["n_iter"]}
