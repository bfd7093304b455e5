"""How near LQ-LoRA's authors come to a weight, with NF4 of bitsandbytes in the place of their own quantizer:
``python -m peftcore.testing.freeze lq_lora.py CHECKOUT``."""

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "HanGuo97/lq-lora", "c2424b3", "models/lq_utils.py")
VERSIONS = ("torch", "bitsandbytes")
ABSENT = ("gurobipy", "models.misc_utils", "models.quantization_utils", "models.quantization_utils_2")
SHARED = Path(__file__).parents[4] / "tests" / "side_by_side" / "beside_packed.py"


def rounded(weight: Tensor, method: str, qconfig: Any) -> Tensor:
    codes = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4").to("cpu")
    result: Tensor = bnb.functional.dequantize_4bit(codes.data, codes.quant_state).float()
    return result


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, float]:
    """Returns the distance by how many iterations there are at most. Of 100 it stops where the distance rises, and
    returns what is one iteration too far."""
    weight, found = load(SHARED).host()[0][0].weight, {}
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    module.quantization_utils_2.quantize = rounded
    warnings.simplefilter("ignore")
    for iterations in (1, 2, 3, 4, 5, 6, 8, 100):
        options = {"num_ranks": 3, "num_iterations": iterations, "randomized": False, "qconfig": "nf4"}
        L1, L2, Q, _ = module.lowrank_quantized_sparse_decomposition(weight, **options)
        found[str(iterations)] = torch.linalg.norm(weight - L1 @ L2 - Q).item()
    return found
