"""What LoRA-XS' authors make of a matrix, and what it computes then, in float32:
``python -m peftcore.testing.freeze lora_xs.py CHECKOUT``."""

from pathlib import Path

import peft
import torch
import yaml
from torch import nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "MohammadrezaBanaei/LoRA-XS", "e50b1a8", "utils/initialization_utils.py")
VERSIONS = ("torch", "peft", "scikit-learn")


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, list[list[float]]]:
    """Returns the factors, the output for a vector, and the merged weight, at rank 2 and alpha 3."""
    module = load(checkout / SOURCE.script, root=checkout)
    base = nn.Sequential(nn.Linear(4, 3, bias=False))
    base[0].weight.copy_(torch.tensor([[0.9, -0.4, 0.1, 0.3], [0.2, 0.7, -0.5, 0.1], [-0.3, 0.2, 0.4, 0.6]]))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    model = peft.LoraModel(base, config, "default")
    options = yaml.safe_load((checkout / "config" / "reconstruct_config.yaml").read_text())
    options["svd"]["rank"] = 2
    module.find_and_initialize(model.model, {"default": config}, "default", "svd", options, None)
    layer = model.model[0]
    layer.default_lora_latent_mapping.weight.copy_(torch.tensor([[0.5, -0.2], [0.3, 0.4]]))
    output, update = layer(torch.tensor([[1.0, 2.0, -1.0, 0.5]])), layer.get_delta_weight("default")
    found = {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight, "output": output}
    found["merged"] = layer.weight + update
    return {name: tensor.tolist() for name, tensor in found.items()}
