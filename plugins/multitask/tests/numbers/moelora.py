"""What the layer of MOELoRA's authors gives for rows of two tasks, on tensors of sines, and two of them under the gate
that their script shares; what these start from and train, and the script's options:
``python -m peftcore.testing.freeze moelora.py CHECKOUT``."""

import importlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "liuqidong07/MOELoRA-peft", "2d9efa4", "src/MLoRA/peft/tuners/mmoelora.py")
VERSIONS = ("torch", "transformers")
EXPERTS, TASKS, WIDTH = 2, 3, 6


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


class Pair(nn.Module):
    """Two layers, of which theirs are told the tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.config = nn.Linear(5, 4), nn.Linear(4, 5), {"model_type": "pair"}
        with torch.no_grad():
            for number, each in enumerate(self.parameters()):
                each.copy_(wave(*each.shape, step=1.1 + 0.2 * number))

    def forward(self, input_ids: Tensor, task_id: Tensor | None = None, **_: Any) -> Tensor:
        told = {} if task_id is None else {"task_id": task_id}
        output: Tensor = self.two(self.one(input_ids, **told).tanh(), **told)
        return output

    def prepare_inputs_for_generation(self) -> None:
        """For their wrapper, which asks for it and does not call it here."""


def theirs(checkout: Path) -> Any:
    importlib.import_module("transformers")
    return load(checkout / SOURCE.script, root=checkout)


def shared(checkout: Path, rank: int = 4, **sizes: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns what their script makes of the two layers, and its tensors by our names; beside these, each layer has a
    table and a gate that nothing reads."""
    theirs(checkout)
    made = importlib.import_module("src.MLoRA.peft")
    sizes = {"expert_num": EXPERTS, "task_num": TASKS, "task_embedding_dim": WIDTH, **sizes}
    config = made.MMOELoraConfigS(
        task_type="CAUSAL_LMS", target_modules=["one", "two"], inference_mode=False, r=rank, lora_alpha=3.0,
        lora_dropout=0.1, **sizes
    )  # fmt: skip
    model = made.get_peft_model(Pair(), config).double().eval()
    names = {"vectors": "lora_task_embedding.default.weight", "gate": "lora_gate.default.GateL.weight"}
    for layer in ("one", "two"):
        for kind in "AB":
            experts = f"base_model.model.{layer}.lora_{kind}.default.lora{kind}"
            names |= {f"{layer}.{kind}.{e}": f"{experts}.{e}.mlp.weight" for e in range(sizes["expert_num"])}
    return model, {ours: model.get_parameter(name) for ours, name in names.items()}


def filled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for number, (name, each) in enumerate(tensors.items()):
            each = each[:TASKS] if name == "vectors" else each
            each.copy_(wave(*each.shape, step=0.5 + 0.2 * number))
    return tensors


def gradients(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the output ``[rows, tokens, features]`` for rows of all tasks, and gradients."""
    y = model(wave(TASKS, 3, 5, step=0.9).transpose(0, 1), task_id=torch.arange(TASKS)).transpose(0, 1)
    (y * wave(TASKS, 3, 5, step=0.3)).sum().backward()
    found = {name: each.grad for name, each in tensors.items()}
    assert not found["vectors"][TASKS:].any(), "a task reads the last row"
    return y, found | {"vectors": found["vectors"][:TASKS]}


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns outputs and gradients, all flat, for a gate in the layer and for one that layers share."""
    model, tensors = shared(checkout)
    y, found = gradients(model, filled(tensors))
    return {
        "each": one(checkout),
        "shared": {name: tensor.flatten().tolist() for name, tensor in {"y": y, **found}.items()},
    }


def one(checkout: Path) -> dict[str, list[float]]:
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
    """Returns what the tensors of a layer with 2000 inputs are drawn from, 20 experts of rank 2, and the gate that
    layers share and its vectors, of 20 tasks."""
    sizes = {"expert_num": 20, "task_num": 20, "task_embedding_dim": 2000}
    layer, (_, tensors) = theirs(checkout).MMOELoraLinear("one", 2000, 4, r=40, **sizes), shared(checkout, 40, **sizes)
    A, B = (
        torch.stack([each.mlp.weight for each in experts])
        for experts in (layer.lora_A["one"].loraA, layer.lora_B["one"].loraB)
    )
    return {"A": drawn(A), "B": drawn(B), "vectors": drawn(tensors["vectors"]), "gate": drawn(tensors["gate"])}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of all that gets a gradient of a text of each task, without the row that no task reads."""
    model, tensors = shared(checkout)
    _, found = gradients(model, filled(tensors))
    assert all(each.any() for each in found.values())
    others = {name for name, each in model.named_parameters() if each.grad is None and each.requires_grad}
    assert others == {
        f"base_model.model.{layer}.lora_{kind}.weight"
        for layer in ("one", "two")
        for kind in ("task_embedding.default", "gate.default.GateL")
    }
    return {name: each.numel() for name, each in found.items()}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script, and those of their program that it leaves as they are."""
    told = flags((checkout / "experiments/moelora.bash").read_text().rpartition("deepspeed")[0])
    own = load(checkout / "src/MLoRA/arguments.py", root=checkout).ModelArguments(model_name_or_path="")
    names = {"rank": "lora_rank", "experts": "expert_num", "dropout": "lora_dropout", "alpha": "lora_alpha"}
    names |= {"task_width": "task_embedding_dim", "tasks": "task_num"}
    return {ours: told.get(name, getattr(own, name)) for ours, name in names.items()}
