"""What the layer of Polytropon's authors gives for rows of two tasks, on tensors of sines; what it starts from and
trains, and its options: ``python -m peftcore.testing.freeze polytropon.py CHECKOUT``."""

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "McGill-NLP/polytropon", "d567ea8", "src/polytropon/adapters.py")
VERSIONS = ("torch",)


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns the output, and the gradients of the skills' factors, ``[skills, rank, in]`` and ``[skills, out, rank]``,
    and of the logits, all flat: in evaluation, and in training, where torch's generator is at 0 before the forward."""
    module, found = load(checkout / SOURCE.script, root=checkout / "src"), {}
    for mode in ("evaluation", "training"):
        layer = module.SkilledLoRALinear(4, 3, None, wave(4, 5, step=1.1), wave(4, step=1.3), r=2).double()
        layer.train(mode == "training").task_ids = torch.tensor([2, 0])
        with torch.no_grad():
            layer.skill_logits.copy_(2 * wave(4, 3, step=0.7))
            layer.skills_weight_A.copy_(wave(3, 2, 5, step=1.7).mT.reshape(3, -1))
            layer.skills_weight_B.copy_(wave(3, 4, 2, step=2.3).mT.reshape(3, -1))
        torch.manual_seed(0)
        y = layer(wave(2, 3, 5, step=0.9))
        (y * wave(2, 3, 4, step=0.3)).sum().backward()
        A, B = layer.skills_weight_A.grad.view(3, 5, 2).mT, layer.skills_weight_B.grad.view(3, 2, 4).mT
        parts = {"y": y, "A": A, "B": B, "logits": layer.skill_logits.grad}
        found[mode] = {name: tensor.flatten().tolist() for name, tensor in parts.items()}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the factors of 10 skills of rank 2 for 2000 inputs are drawn from, and logits of 4000 tasks."""
    module = load(checkout / SOURCE.script, root=checkout / "src")
    layer = module.SkilledLoRALinear(4000, 10, None, torch.zeros(4, 2000), None, r=2)
    return {"A": drawn(layer.skills_weight_A), "B": drawn(layer.skills_weight_B), "logits": drawn(layer.skill_logits)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train of a layer ``[4, 5]`` in a model, for 4 tasks and 3 skills, by our names."""
    module = load(checkout / "src/polytropon/polytropon.py", root=checkout / "src", absent=["scipy"])
    model = module.SkilledMixin(nn.ModuleDict({"q": nn.Linear(5, 4)}), n_tasks=4, n_skills=3).model
    names = {"skills_weight_A": "A", "skills_weight_B": "B", "skill_logits": "logits"}
    return {names[name.split(".")[1]]: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the rank of their layer, the only number that it has by default."""
    module = load(checkout / SOURCE.script, root=checkout / "src")
    return {"rank": inspect.signature(module.SkilledLoRALinear).parameters["r"].default}
