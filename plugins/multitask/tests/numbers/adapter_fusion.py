"""What AdapterFusion of AdapterHub's `adapters` computes over three adapters of a small Llama, in float64, all numbers
waves: ``python -m peftcore.testing.freeze adapter_fusion.py CHECKOUT``.

The package wants an older transformers than the other tests, so it is frozen. CHECKOUT is a folder that ``pip install
--target CHECKOUT --no-deps adapters==1.3.0 transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2`` filled,
and which stands first in PYTHONPATH; its code is that of the commit below, but for the version and the ends of lines.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source

SOURCE = Source("adapters 1.3", "adapter-hub/adapters", "88f18eb", "src/adapters/methods/modeling.py")
VERSIONS = ("adapters", "transformers", "torch")
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16}
IDS = [[1, 5, 3, 9, 2], [4, 4, 10, 0, 7]]


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


@torch.no_grad()
def waves(tensors: Iterable[Tensor], start: float, step: float = 0.37) -> None:
    for index, tensor in enumerate(tensors):
        tensor.copy_(0.5 * wave(tensor, start + step * index))


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns the output, ``[2, 5, 8]``, gradients of Q, q, K and V in both layers, flat, and the penalty, with V
    ("dynamic") and without ("static"); in training. The package's K has a bias too: no number depends on it."""
    import adapters
    import transformers
    from adapters import SeqBnConfig
    from adapters.composition import Fuse

    assert Path(adapters.__file__).is_relative_to(checkout.resolve())
    found: dict[str, dict[str, Any]] = {}
    for kind in ("dynamic", "static"):
        model: Any = transformers.LlamaModel(transformers.LlamaConfig(**SIZES)).double()
        waves(model.parameters(), 0.1)
        adapters.init(model)
        for name in "abc":
            model.add_adapter(name, config=SeqBnConfig(reduction_factor=2))
        fused = Fuse(*"abc")
        model.add_adapter_fusion(fused, kind)
        model.train_adapter_fusion(fused)
        model.double()
        for k, name in enumerate("abc"):
            waves((p for key, p in model.named_parameters() if f".adapters.{name}." in key), 0.2 + k)
        own: dict[str, Tensor] = {}
        for layer in range(2):
            prefix = f"layers.{layer}.output_adapters.adapter_fusion_layer.a,b,c"
            parts = ["query.weight", "query.bias", "key.weight"] + ["value.weight"] * (kind == "dynamic")
            tensors = {f"{prefix}.{part}": model.get_parameter(f"{prefix}.{part}") for part in parts}
            waves(tensors.values(), 0.7 + layer, 0.31)
            own |= tensors
            bias = model.get_parameter(f"{prefix}.key.bias")
            bias.data.copy_(0.5 * wave(bias, 0.9))
        y = model.train()(input_ids=torch.tensor(IDS))[0]
        (y.square() * wave(y, 0.3)).sum().backward()
        penalty = model.get_fusion_regularization_loss() if kind == "dynamic" else None
        found[kind] = {
            "output": rounded(y),
            "gradients": {name: rounded(p.grad) for name, p in own.items()},
            "penalty": None if penalty is None else penalty.item(),
        }
    return found


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]
