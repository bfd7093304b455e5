"""What two layers give under the masks of ProPETL's authors over one adapter, in float64, on tensors of sines; what
adapter and masks start from, what trains, and the options of their script:
``python -m peftcore.testing.freeze propetl.py CHECKOUT``."""

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "ChaosCodes/ProPETL", "1c08f19", "propetl-roberta/src/transformers/adapters/modeling.py")
VERSIONS = ("torch",)
ABSENT = ("transformers.adapters.configuration", "transformers.adapters.context")
SPARSITY = 0.3
BERT = {"init_weights": "bert", "non_linearity": "relu", "scaling": 1.0, "original_ln_before": True}
BERT |= {"original_ln_after": True, "residual_before_ln": True}
OFF = dict.fromkeys(("ln_before", "ln_after", "adapter_residual_before_ln", "use_gating", "phm_layer"), False)


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def authors(checkout: Path) -> Any:
    """Returns the module of their adapters. Packages around it are empty."""
    root = checkout / "propetl-roberta/src"
    for name in ("transformers", "transformers.adapters"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(root / name.replace(".", "/"))]
    sys.modules["transformers.activations"] = ModuleType("transformers.activations")
    vars(sys.modules["transformers.activations"])["get_activation"] = {"relu": nn.functional.relu}.get
    return load(checkout / SOURCE.script, root=root, absent=ABSENT)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output of linear, tanh, linear, each linear layer under an adapter, and all gradients, flat."""
    of = authors(checkout)
    adapter = of.Adapter("it", 6, 4, {**OFF, **BERT}).double()
    layers = [nn.Linear(6, 6).double(), nn.Linear(6, 6).double()]
    masks = [of.AdapterSubnet("it", 6, 4, SPARSITY).double() for _ in layers]
    own = {"down": adapter.adapter_down[0], "up": adapter.adapter_up}
    with torch.no_grad():
        for index, (layer, mask) in enumerate(zip(layers, masks, strict=True)):
            layer.weight.copy_(wave(6, 6, step=1.1 + index))
            layer.bias.copy_(wave(6, step=1.3 + index))
            mask.down_mask.copy_(wave(4, 6, step=1.9 + index).T)
            mask.up_mask.copy_(wave(6, 4, step=2.9 + index).T)
        own["down"].weight.copy_(wave(4, 6, step=1.7))
        own["down"].bias.copy_(wave(4, step=0.7))
        own["up"].weight.copy_(wave(6, 4, step=2.3))
        own["up"].bias.copy_(wave(6, step=0.3))
    x = wave(2, 3, 6, step=0.9).requires_grad_()
    y = x
    for index, (layer, mask) in enumerate(zip(layers, masks, strict=True)):
        h = layer(y if index == 0 else y.tanh())
        y, *_ = adapter.forward_with_mask(h, *mask(), residual_input=h)
    (y * wave(2, 3, 6, step=0.37)).sum().backward()
    found = {"y": y, "x": x.grad}
    for name, linear in own.items():
        found |= {f"{name}.weight": linear.weight.grad, f"{name}.bias": linear.bias.grad}
    for index, mask in enumerate(masks):
        found |= {f"{index}.down": mask.down_mask.grad.T, f"{index}.up": mask.up_mask.grad.T}
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the adapter and the masks are drawn from, between 400 features and 100; masks as they are turned."""
    of = authors(checkout)
    adapter, mask = of.Adapter("it", 400, 100, {**OFF, **BERT}), of.AdapterSubnet("it", 400, 100, SPARSITY)
    down, up = adapter.adapter_down[0], adapter.adapter_up
    found = {"down.weight": down.weight, "down.bias": down.bias, "up.weight": up.weight, "up.bias": up.bias}
    found |= {"down_scores": mask.down_mask, "up_scores": mask.up_mask}
    return {name: drawn(tensor) for name, tensor in found.items()}


class Told(dict[str, Any]):
    """Options of one adapter that all layers share."""

    is_parallel = False


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers of two layers that share an adapter train, by the first of their names."""
    root, of = checkout / "propetl-roberta/src", authors(checkout)
    layers = load(root / "transformers/adapters/layer.py", root=root, absent=ABSENT)
    told = Told(**OFF, **BERT, reduction_factor=2)
    config = SimpleNamespace(hidden_size=8, adapters=SimpleNamespace(match=lambda *_, **__: told))
    model, shared = nn.ModuleList(), of.Adapter("it", 8, 4, told)
    for index in range(2):
        layer = layers.AdapterLayer("output_adapter", config)
        layer._init_adapter_modules()
        layer.add_shared_adapter("it", index, SPARSITY, shared)
        model.append(layer)
    model.requires_grad_(False)
    for layer in model:
        layer.enable_adapters(layers.Stack("it"), True, False)
    return {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script for adapters in RoBERTa-base, which is 768 wide."""
    told = flags((checkout / "propetl-roberta/scripts/run_adapter.sh").read_text())
    return {
        "bottleneck": 768 // told["adapter_reduction_factor"],
        "kept": told["sparsity"],
        "mask_ratio": round(told["mask_learning_rate"] / told["learning_rate"], 6),
    }
