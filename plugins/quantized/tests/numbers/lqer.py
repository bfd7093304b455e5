"""What LQER's authors correct of two weights' rounding, with NF4 of bitsandbytes, and the options of their script:
``python -m peftcore.testing.freeze lqer.py CHECKOUT``."""

import re
import tomllib
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "ChengZhang-98/lqer", "88b6960", "src/lqer/approximate/lqer_act.py")
VERSIONS = ("torch", "bitsandbytes")
ABSENT = ("lqer.logging", "lqer.utils", "lqer.quantize", "tqdm", "pandas")
SHARED = Path(__file__).parents[4] / "tests" / "side_by_side" / "beside_packed.py"


def rounded(weight: Tensor) -> Tensor:
    weight = weight.float()
    codes = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4").to("cpu")
    result: Tensor = bnb.functional.dequantize_4bit(codes.data, codes.quant_state).double()
    return result


@torch.no_grad()
def corrections(checkout: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns what rounding loses of a weight, and what is corrected of it. In float64, and the factors not rounded: in
    float32 the code divides singular vectors by 0.0001 where a channel is silent."""
    shared, found = load(SHARED), {}
    (model, x), generator = shared.host(), torch.Generator().manual_seed(2)
    batches = [each * torch.randn(shared.WIDTH, generator=generator).exp() for each in (x, x.flip(0))]
    module = load(checkout / SOURCE.script, root=checkout / "src", absent=ABSENT)
    hooks = load(checkout / "src/lqer/statistic_profiler/scale.py").register_scale_hooks(model)
    for batch in batches:
        batch[..., 5] = 0
        model(batch)
    scales = hooks.get_scale_dict()
    for name in ("0", "2"):
        weight, same = model.get_submodule(name).weight.double(), torch.nn.Identity()
        approximator = module.WeightApproximatorLqerAct(name, weight, 3, rounded, same, same).double()
        approximator.initialize_scale(scales[f"{name}.scale"])
        approximator.approximate()
        found[name] = weight - rounded(weight), approximator.approximated_q_error_T().T
    return found


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the norms of what rounding loses, of what is left of it, and of what is corrected."""
    found = corrections(checkout)
    return {k: [each.norm().item() for each in (gap, gap - own, own)] for k, (gap, own) in found.items()}


def start(checkout: Path) -> dict[str, list[list[float]]]:
    """Returns what is corrected of 4 outputs and 8 inputs, of which one is silent."""
    return {name: own[:4, :8].tolist() for name, (_, own) in corrections(checkout).items()}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the only rank of their sweep, and the bits of both factors in the template that it fills."""
    experiments = checkout / "experiments"
    ranks = re.search(r"rank_options=\((\d+)\)", (experiments / "pipeline/sweep_lqer_act.sh").read_text())
    template = tomllib.loads((experiments / "configs/template/llama-7b.toml").read_text())
    told = template["approximate"]["approximator"]["default"]
    assert ranks and told["A_quantizer"]["width"] == told["B_quantizer"]["width"]
    return {"rank": int(ranks[1]), "factor_bits": told["A_quantizer"]["width"]}
