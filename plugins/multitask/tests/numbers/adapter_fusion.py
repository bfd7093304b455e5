"""What AdapterFusion of AdapterHub's `adapters` computes over three adapters of a small Llama and a small BERT, in
float64, all numbers waves: ``python -m peftcore.testing.freeze adapter_fusion.py CHECKOUT``.

The package wants an older transformers than the other tests, so it is frozen. CHECKOUT is a folder that ``pip install
--target CHECKOUT --no-deps adapters==1.3.0 transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2`` filled,
and which stands first in PYTHONPATH; its code is that of the commit below, but for the version and the ends of lines.
"""

import itertools
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
    """Returns by host and kind, with V ("dynamic") and without ("static"), the output, ``[2, 5, 8]``, gradients of Q,
    q, K and V in both layers and of the tensors of the first adapter, flat, and the penalty; in training, without
    dropout. The package's K has a bias too: no number depends on it."""
    import adapters
    import transformers
    from adapters import SeqBnConfig
    from adapters.composition import Fuse

    assert Path(adapters.__file__).is_relative_to(checkout.resolve())
    found: dict[str, dict[str, Any]] = {}
    for host, kind in itertools.product(("llama", "bert"), ("dynamic", "static")):
        if host == "bert":
            without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            model: Any = transformers.BertModel(transformers.BertConfig(**SIZES, **without), add_pooling_layer=False)
        else:
            model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES))
        model, place = model.double(), "encoder.layer.{}.output" if host == "bert" else "layers.{}.output_adapters"
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
            prefix = f"{place.format(layer)}.adapter_fusion_layer.a,b,c"
            parts = ["query.weight", "query.bias", "key.weight"] + ["value.weight"] * (kind == "dynamic")
            tensors = {f"{prefix}.{part}": model.get_parameter(f"{prefix}.{part}") for part in parts}
            waves(tensors.values(), 0.7 + layer, 0.31)
            own |= tensors
            bias = model.get_parameter(f"{prefix}.key.bias")
            bias.data.copy_(0.5 * wave(bias, 0.9))
        first = {key: p.requires_grad_() for key, p in model.named_parameters() if ".adapters.a." in key}
        y = model.train()(input_ids=torch.tensor(IDS))[0]
        (y.square() * wave(y, 0.3)).sum().backward()
        penalty = model.get_fusion_regularization_loss() if kind == "dynamic" else None
        found.setdefault(host, {})[kind] = {
            "output": rounded(y),
            "gradients": {name: rounded(p.grad) for name, p in (own | first).items()},
            "penalty": None if penalty is None else penalty.item(),
        }
    return found


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]
