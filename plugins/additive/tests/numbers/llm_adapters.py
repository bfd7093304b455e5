"""What the bottleneck adapters of LLM-Adapters make of a small Llama, all numbers waves, in float32 (their code casts
to it): ``python -m peftcore.testing.freeze llm_adapters.py CHECKOUT``."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("others", "AGI-Edgerunners/LLM-Adapters", "8166572", "peft/src/peft/tuners/bottleneck.py")
VERSIONS = ("torch", "transformers")
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16}
IDS = [[1, 5, 3, 9, 2], [4, 4, 10, 0, 7]]


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


@torch.no_grad()
def waves(tensors: Iterable[Tensor], start: float) -> None:
    for index, tensor in enumerate(tensors):
        tensor.copy_(0.5 * wave(tensor, start + 0.37 * index))


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns the output, ``[2, 5, 8]``, and gradients of all adapter tensors, flat, by our names of their adapters, at
    the modules that their code takes by default."""
    module = load(checkout / SOURCE.script, root=checkout / "peft/src")
    targets = sys.modules["peft.mapping"]._prepare_bottleneck_config
    import transformers

    found = {}
    for name, options in {
        "llm_adapters_series": {},
        "llm_adapters_p": {"use_adapterp": True},
        "llm_adapters_parallel": {"use_parallel_adapter": True},
    }.items():
        model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES)).double()
        waves(model.parameters(), 0.1)
        config = targets(module.BottleneckConfig(bottleneck_size=4, **options), {"model_type": "llama"})
        module.BottleneckModel(config, model.float())
        own = [(key, p) for key, p in model.named_parameters() if ".adapter_" in key]
        waves((p for _, p in own), 0.2)
        y = model(input_ids=torch.tensor(IDS))[0]
        (y.square() * wave(y, 0.3)).sum().backward()
        found[name] = {"output": y.flatten().tolist(), "gradients": {key: p.grad.flatten().tolist() for key, p in own}}
    return found
