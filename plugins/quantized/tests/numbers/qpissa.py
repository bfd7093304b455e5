"""How QPiSSA's authors take a weight apart, with NF4 of bitsandbytes:
``python -m peftcore.testing.freeze qpissa.py CHECKOUT``."""

import sys
from pathlib import Path
from typing import Any

import torch

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "GraphPKU/PiSSA", "87f4db6", "utils/init_qpissa.py")
VERSIONS = ("torch", "bitsandbytes")
SHARED = Path(__file__).parents[4] / "tests" / "side_by_side" / "beside_packed.py"


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns, by the iterations, a corner of the factors' product and of all that the layer holds then, ``[2, 6]``
    each, and how far the latter is from the weight."""
    weight, found = load(SHARED).host()[0][0].weight, {}
    sys.argv = ["init_qpissa.py", "--base_model_dir=none", "--output_path=none", "--target_modules", "none"]
    module = load(checkout / SOURCE.script, absent=("transformers", "peft", "tqdm"))  # it runs on no model then
    for iterations in (1, 5):
        _, base, A, B = module.pissa_quant(weight, 3, iterations)
        product, distance = B @ A, torch.linalg.norm(weight - base - B @ A).item()
        whole = base + product
        parts = {"product": product[:2, :6].tolist(), "weight": whole[:2, :6].tolist(), "distance": distance}
        found[str(iterations)] = parts
    return found
