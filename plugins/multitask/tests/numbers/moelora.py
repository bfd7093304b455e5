"""What the layer of MOELoRA's authors gives for rows of two tasks, on tensors of sines; what it starts from, and
their options: ``python -m peftcore.testing.freeze moelora.py CHECKOUT``."""

import importlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "liuqidong07/MOELoRA-peft", "2d9efa4", "src/MLoRA/peft/tuners/mmoelora.py")
VERSIONS = ("torch", "transformers")
EXPERTS, TASKS, WIDTH = 2, 3, 6


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def theirs(checkout: Path) -> Any:
    importlib.import_module("transformers")
    return load(checkout / SOURCE.script, root=checkout)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output ``[tokens, rows, features]`` for rows of the tasks 2 and 0, and gradients, all flat; those of
    the table of tasks without the row that no task reads."""
    layer = (
        theirs(checkout)
        .MMOELoraLinear("one", 5, 4, r=4, lora_alpha=3.0, expert_num=EXPERTS, task_num=TASKS, task_embedding_dim=WIDTH)
        .double()
    )
    A = [each.mlp.weight for each in layer.lora_A["one"].loraA]
    B = [each.mlp.weight for each in layer.lora_B["one"].loraB]
    table, gate = layer.lora_task_embedding["one"].weight, layer.lora_gate["one"].GateL.weight
    with torch.no_grad():
        layer.weight.copy_(wave(4, 5, step=1.1))
        layer.bias.copy_(wave(4, step=1.3))
        table[:TASKS].copy_(wave(TASKS, WIDTH, step=0.7))
        gate.copy_(wave(EXPERTS, WIDTH, step=0.5))
        for weights, values in ((A, wave(EXPERTS, 2, 5, step=1.7)), (B, wave(EXPERTS, 4, 2, step=2.3))):
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)
    y = layer(wave(2, 3, 5, step=0.9).transpose(0, 1), task_id=torch.tensor([2, 0]))
    (y * wave(2, 3, 4, step=0.3).transpose(0, 1)).sum().backward()
    parts = {"A": torch.stack([each.grad for each in A]), "B": torch.stack([each.grad for each in B])}
    found = {"y": y.transpose(0, 1), **parts, "vectors": table.grad[:TASKS], "gate": gate.grad}
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of a layer with 2000 inputs are drawn from: 20 experts of rank 2, 20 tasks."""
    layer = theirs(checkout).MMOELoraLinear("one", 2000, 4, r=40, expert_num=20, task_num=20, task_embedding_dim=2000)
    A, B = (
        torch.stack([each.mlp.weight for each in experts])
        for experts in (layer.lora_A["one"].loraA, layer.lora_B["one"].loraB)
    )
    vectors, gate = layer.lora_task_embedding["one"].weight, layer.lora_gate["one"].GateL.weight
    return {"A": drawn(A), "B": drawn(B), "vectors": drawn(vectors), "gate": drawn(gate)}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script, and those of their program that it leaves as they are."""
    told = flags((checkout / "experiments/moelora.bash").read_text().rpartition("deepspeed")[0])
    own = load(checkout / "src/MLoRA/arguments.py", root=checkout).ModelArguments(model_name_or_path="")
    names = {"rank": "lora_rank", "experts": "expert_num", "dropout": "lora_dropout", "alpha": "lora_alpha"}
    names |= {"task_width": "task_embedding_dim", "tasks": "task_num"}
    return {ours: told.get(name, getattr(own, name)) for ours, name in names.items()}
