"""What IR-QLoRA's authors quantize a weight to, what their layer gives, on a CPU, what it starts from and trains, and
the options of their script:
``python -m peftcore.testing.freeze ir_qlora.py CHECKOUT``."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "htqin/IR-QLoRA", "e6fef4a", "utils.py")
VERSIONS = ("torch", "bitsandbytes", "peft")


def adapted(checkout: Path, dense: nn.Linear, rank: int, steps: int) -> Any:
    """Returns their layer around what they quantize of a dense one, at alpha 8."""
    bnb.nn.Params4bit.cuda = lambda weight, *args: weight.to("cpu")
    size, module = (dense.in_features, dense.out_features), load(checkout / SOURCE.script)
    packed = nn.Sequential(bnb.nn.Linear4bit(*size, bias=False, quant_type="nf4")).to("cpu")
    packed.is_loaded_in_4bit = True  # how peft knows
    model = peft.LoraModel(packed, peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["0"]), "default").model
    (layer,) = module._replace_with_ours_lora_4bit_linear(
        model, model_fp=nn.Sequential(dense), tau_range=0.1, tau_n=steps
    )
    return layer


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, Any]:
    """Returns checksums of the codes and of the shifts' codes, the largest shift, and outputs of the layer. The code
    leaves it to rounding which of two equally even uses of the codes it takes; the seed is one where that makes no
    difference."""
    generator = torch.Generator().manual_seed(43)
    weight, x = torch.randn(128, 128, generator=generator) * 0.05, torch.randn(3, 128, generator=generator)
    A, B = torch.randn(4, 128, generator=generator) * 0.1, torch.randn(128, 4, generator=generator) * 0.1
    dense = nn.Linear(128, 128, bias=False)
    dense.weight.copy_(weight)
    layer = adapted(checkout, dense, rank=4, steps=51)
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


def named(checkout: Path, dense: nn.Linear, rank: int) -> dict[str, nn.Parameter]:
    """Returns what trains, by our names."""
    ours = {"lora_A.default.weight": "A", "lora_B.default.weight": "B"}
    ours |= {"lora_default_A_scale": "b1", "lora_default_B_scale": "b2"}
    layer = adapted(checkout, dense, rank, steps=1)
    return {ours.get(name, name): each for name, each in layer.named_parameters() if each.requires_grad}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the adapter of a layer ``[128, 640]`` starts from, at rank 64."""
    return {name: drawn(each) for name, each in named(checkout, nn.Linear(640, 128, bias=False), 64).items()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train of a layer ``[128, 128]``, by our names, at rank 4."""
    return {name: each.numel() for name, each in named(checkout, nn.Linear(128, 128, bias=False), 4).items()}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of their script."""
    told = load(checkout / "irlora.py", absent=("datasets", "evaluate")).TrainingArguments.__dataclass_fields__
    names = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    return {ours: told[theirs].default for ours, theirs in names.items()}
