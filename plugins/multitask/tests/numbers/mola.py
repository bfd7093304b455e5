"""What the layer of MoLA's authors gives for two rows of three tokens, on tensors of sines, and their balancing loss:
``python -m peftcore.testing.freeze mola.py CHECKOUT``. Their softmax is in float32."""

import ast
import math
import types
from pathlib import Path

import torch
from torch import Tensor

from peftcore.registry.evidence import Source

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
