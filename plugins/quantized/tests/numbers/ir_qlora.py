"""What IR-QLoRA's authors quantize a weight to, and what their layer gives, on a CPU:
``python -m peftcore.testing.freeze ir_qlora.py CHECKOUT``."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "htqin/IR-QLoRA", "e6fef4a", "utils.py")
VERSIONS = ("torch", "bitsandbytes", "peft")


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, Any]:
    """Returns checksums of the codes and of the shifts' codes, the largest shift, and outputs of the layer. The code
    leaves it to rounding which of two equally even uses of the codes it takes; the seed is one where that makes no
    difference."""
    bnb.nn.Params4bit.cuda = lambda weight, *args: weight.to("cpu")
    module, generator = load(checkout / SOURCE.script), torch.Generator().manual_seed(43)
    weight, x = torch.randn(128, 128, generator=generator) * 0.05, torch.randn(3, 128, generator=generator)
    A, B = torch.randn(4, 128, generator=generator) * 0.1, torch.randn(128, 4, generator=generator) * 0.1
    dense = nn.Sequential(nn.Linear(128, 128, bias=False))
    dense[0].weight.copy_(weight)
    packed = nn.Sequential(bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4")).to("cpu")
    packed.is_loaded_in_4bit = True  # how peft knows
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    model = peft.LoraModel(packed, config, "default").model
    (layer,) = module._replace_with_ours_lora_4bit_linear(model, model_fp=dense, tau_range=0.1)
    codes, tau = layer.base_layer.weight.long().flatten(), layer.base_layer.tau_quant.long()
    for parameter, value in ((layer.lora_A.default.weight, A), (layer.lora_B.default.weight, B)):
        parameter.copy_(value)
    layer.lora_default_A_scale.fill_(0.7)
    layer.lora_default_B_scale.fill_(-0.3)
    y = layer(x)
    return {
        "codes": [int(codes.sum()), int((codes * torch.arange(8192)).sum())],
        "shifts": [int(tau.sum()), int((tau.flatten() * torch.arange(256)).sum())],
        "largest shift": layer.base_layer.tau_absmax.item(),
        "outputs": y[0, :6].tolist(),
        "norm of outputs": y.norm().item(),
    }
