"""How near LQ-LoRA's authors come to a weight, with NF4 of bitsandbytes in the place of their own quantizer, what the
factors start from and what trains, and their options:
``python -m peftcore.testing.freeze lq_lora.py CHECKOUT``."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "HanGuo97/lq-lora", "c2424b3", "models/lq_utils.py")
VERSIONS = ("torch", "bitsandbytes", "transformers", "peft")
ABSENT = ("gurobipy", "models.misc_utils", "models.quantization_utils", "models.quantization_utils_2")
SHARED = Path(__file__).parents[4] / "tests" / "side_by_side" / "beside_packed.py"


def rounded(weight: Tensor, method: str, qconfig: Any) -> Tensor:
    codes = bnb.nn.Params4bit(weight.float(), requires_grad=False, compress_statistics=False, quant_type="nf4").to(
        "cpu"
    )
    result: Tensor = bnb.functional.dequantize_4bit(codes.data, codes.quant_state).float()
    return result


def decomposition(checkout: Path) -> Any:
    """Returns their function, with that NF4."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    module.quantization_utils_2.quantize = rounded
    warnings.simplefilter("ignore")
    return module.lowrank_quantized_sparse_decomposition


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, float]:
    """Returns the distance by how many iterations there are at most. Of 100 it stops where the distance rises, and
    returns what is one iteration too far."""
    weight, found = load(SHARED).host()[0][0].weight, {}
    function = decomposition(checkout)
    for iterations in (1, 2, 3, 4, 5, 6, 8, 100):
        options = {"num_ranks": 3, "num_iterations": iterations, "randomized": False, "qconfig": "nf4"}
        L1, L2, Q, _ = function(weight, **options)
        found[str(iterations)] = torch.linalg.norm(weight - L1 @ L2 - Q).item()
    return found


@torch.no_grad()
def start(checkout: Path) -> dict[str, Any]:
    """Returns the low-rank part of the first iterate, ``L1 L2``, of 4 outputs and 6 inputs: B and A at a scale of 1, in
    float64."""
    weight, options = load(SHARED).host()[0][0].weight.double(), {"num_ranks": 3, "randomized": False, "qconfig": "nf4"}
    L1, L2, _, _ = decomposition(checkout)(weight, num_iterations=1, **options)
    return {"A": L2[:, :6].tolist(), "B": L1[:4].tolist()}


def lora_utils(checkout: Path) -> Any:
    absent = ("click", "models.allocation_utils", "models.allocation_utils_2", "models.tensor_container_utils")
    return load(checkout / "models/lora_utils.py", root=checkout, absent=(*ABSENT, *absent))


def trains(checkout: Path) -> dict[str, int]:
    """Returns what trains of a small Llama at rank 2, by name: how many numbers."""
    sizes: Any = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 9}
    model = lora_utils(checkout).prepare_model_for_lora(LlamaForCausalLM(LlamaConfig(hidden_size=8, **sizes)), 2)
    named = ((name.removeprefix("base_model.model."), each) for name, each in model.named_parameters())
    return {name: each.numel() for name, each in named if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their commands for OpenAssistant, and how many iterations their function makes."""
    told = flags((checkout / "scripts/oasst1_lora.sh").read_text())
    iterations = inspect.signature(lora_utils(checkout).transform_lora_layers).parameters["num_iterations"].default
    return {"rank": told["lora_r"], "alpha": told["lora_alpha"], "iterations": iterations}
