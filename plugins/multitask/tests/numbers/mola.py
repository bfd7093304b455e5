"""What the layer of MoLA's authors gives for two rows of three tokens, on tensors of sines, and their balancing loss;
what it starts from and trains, and their options: ``python -m peftcore.testing.freeze mola.py CHECKOUT``. Their
softmax is in float32."""

import ast
import inspect
import math
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn

SOURCE = Source("authors", "GCYZSL/MoLA", "01785c8", "src/mola_lora_hacked.py")
VERSIONS = ("torch",)
EXPERTS = 4
LOSS = "src/mola_modeling_llama_hacked.py"


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def parts(path: Path, *names: str) -> types.SimpleNamespace:
    """Returns functions and classes of a file whose other imports are of old versions that are not installed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [each for each in tree.body if getattr(each, "name", "") in names]
    found: dict[str, object] = {
        "torch": torch,
        "nn": torch.nn,
        "F": torch.nn.functional,
        "math": math,
        "warnings": None,
    }
    found["transpose"] = lambda weight, flipped: weight.T if flipped else weight
    exec(compile(tree, str(path), "exec"), found)  # code of a checkout that whoever runs this has chosen
    return types.SimpleNamespace(**{name: found[name] for name in names})


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output, the gradients of tensors and inputs, and a layer's loss with its gradient, all flat."""
    of_layer = parts(checkout / SOURCE.script, "LoraMoE_Layer", "Linear_MoE")
    layer = of_layer.Linear_MoE("it", 5, 4, r=[2], lora_alpha=3.0, number_experts=[EXPERTS], top_k=[2]).double()
    with torch.no_grad():
        layer.weight.copy_(wave(4, 5, step=1.1))
        layer.bias.copy_(wave(4, step=1.3))
        layer.router["router"].weight.copy_(wave(EXPERTS, 5, step=0.7))
        for index in range(EXPERTS):
            layer.lora_A[f"it_{index}"].weight.copy_(wave(EXPERTS, 2, 5, step=1.7)[index])
            layer.lora_B[f"it_{index}"].weight.copy_(wave(EXPERTS, 4, 2, step=2.3)[index])
    x = wave(2, 3, 5, step=0.9).requires_grad_()
    y, logits = layer(x)
    router = layer.router["router"].weight
    loss = parts(checkout / LOSS, "load_balancing_loss_func").load_balancing_loss_func((logits,), [EXPERTS], [2])
    (of_loss,) = torch.autograd.grad(loss, router, retain_graph=True)
    (y * wave(2, 3, 4, step=0.3)).sum().backward()
    A, B = (torch.stack([held[f"it_{i}"].weight.grad for i in range(EXPERTS)]) for held in (layer.lora_A, layer.lora_B))
    found = {"y": y, "loss": loss, "x": x.grad, "A": A, "B": B, "router": router.grad, "router of the loss": of_loss}
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of a layer with 2000 inputs are drawn from, of 20 experts of rank 2."""
    of_layer = parts(checkout / SOURCE.script, "LoraMoE_Layer", "Linear_MoE")
    layer = of_layer.Linear_MoE("it", 2000, 4, r=[2], number_experts=[20], top_k=[2])
    A, B = (torch.stack([held[f"it_{i}"].weight for i in range(20)]) for held in (layer.lora_A, layer.lora_B))
    return {"A": drawn(A), "B": drawn(B), "router": drawn(layer.router["router"].weight)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train of a layer ``[4, 5]`` in a model, by our names."""
    theirs = parts(checkout / SOURCE.script, "LoraMoE_Layer", "Linear_MoE", "mark_only_lora_as_trainable")
    model = torch.nn.Sequential(theirs.Linear_MoE("it", 5, 4, r=[2], number_experts=[EXPERTS], top_k=[2]))
    theirs.mark_only_lora_as_trainable(model)
    found = {"lora_A": 0, "lora_B": 0, "router": 0}
    for name, each in model.named_parameters():
        if each.requires_grad:
            found[name.split(".")[1]] += each.numel()
    return {name.removeprefix("lora_"): count for name, count in found.items()}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script; its lists have a number for each of 32 layers."""
    told = inspect.signature(parts(checkout / "mola_training.py", "train").train).parameters
    experts, rank, top_k = (
        [int(each) for each in told[name].default.split(",")] for name in ("number_experts", "lora_r", "top_k")
    )
    quarters = experts[::8]
    assert experts == [number for number in quarters for _ in range(8)] and rank == rank[:1] * 32 == [*rank]
    assert top_k == top_k[:1] * 32
    options = {"experts": quarters, "rank": rank[0], "top_k": top_k[0]}
    options |= {"alpha": told["lora_alpha"].default, "dropout": told["lora_dropout"].default}
    return {**options, **({} if told["obalance"].default else {"balance": 0.0})}
