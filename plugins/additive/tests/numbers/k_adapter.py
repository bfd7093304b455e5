"""What K-Adapter's authors make of a small RoBERTa, in float64, all numbers waves, and at which layers of a large one
their scripts have adapters: ``python -m peftcore.testing.freeze k_adapter.py CHECKOUT``.

Their adapters are 768 wide; smaller ones of the same class take their places.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "microsoft/K-Adapter", "43651cd", "pytorch_transformers/my_modeling_roberta.py")
VERSIONS = ("torch",)
ABSENT = ("boto3", "botocore", "botocore.config", "botocore.exceptions", "six")
SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
SIZES |= {"max_position_embeddings": 16, "type_vocab_size": 1}
WITHOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LAYERS = [0, 2]
SMALL = {"adapter_size": 4, "hidden_size": 4, "intermediate_size": 16, "num_attention_heads": 2, **WITHOUT}
IDS = [[8, 5, 3, 9, 4], [8, 10, 7, 6, 2]]


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


@torch.no_grad()
def waves(tensors: Iterable[tuple[str, Tensor]], start: float) -> None:
    """Fill tensors in the order of their names."""
    for index, (_, tensor) in enumerate(sorted(tensors)):
        tensor.copy_(0.5 * wave(tensor, start + 0.37 * index))


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]


def adapted(module: Any, fusion: str, chains: Iterable[str]) -> Any:
    """Returns their RoBERTa with so many chains, in training."""
    config = module.RobertaConfig(vocab_size_or_config_json_file=11, **SIZES, **WITHOUT, layer_norm_eps=1e-5)
    config.output_hidden_states = True
    module.RobertaModel.from_pretrained = lambda *args, **kwargs: module.RobertaModel(config)
    whole = module.RobertaModelwithAdapter
    whole.load_pretrained_adapter = lambda self, chain, path: chain
    args = SimpleNamespace(adapter_size=4, adapter_list=LAYERS, adapter_skip_layers=0, adapter_transformer_layers=2)
    args.device, args.freeze_bert, args.freeze_adapter, args.fusion_mode = "cpu", False, False, fusion
    args.meta_fac_adaptermodel, args.meta_lin_adaptermodel = ("fac" in chains, "lin" in chains)
    model = whole(args)
    for index, name in enumerate(chains):
        chain = getattr(model, f"{name}_adapter")
        small = type("Small", (chain.adapter_config,), SMALL)
        chain.adapter = nn.ModuleList([module.Adapter(args, small) for _ in LAYERS])
        waves(chain.double().named_parameters(), 0.9 + index)
    waves(model.model.double().named_parameters(), 0.4)
    return model.double().train()


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the features ``[2, 5, 8]`` for both ways to join chains, and gradients of the words, and of the one chain
    and its linear layer, flat; and the numbers of layers by script for pre-training."""
    package = sys.modules["pytorch_transformers"] = ModuleType("pytorch_transformers")
    package.__path__ = [str(checkout / "pytorch_transformers")]
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    found: dict[str, Any] = {}
    for fusion, chains in {"concat": ["fac"], "add": ["fac", "lin"]}.items():
        model = adapted(module, fusion, chains)
        own: dict[str, nn.Parameter] = {}
        if fusion == "concat":
            waves(model.task_dense_fac.named_parameters(), 0.2)
            own = {**dict(model.fac_adapter.named_parameters()), **dict(model.task_dense_fac.named_parameters())}
        (y,) = model(torch.tensor(IDS))
        (y.square() * wave(y, 0.3)).sum().backward()
        words = model.model.embeddings.word_embeddings.weight
        found[fusion] = {"output": rounded(y), "words": rounded(words.grad)}
        found[fusion]["gradients"] = {name: rounded(p.grad) for name, p in own.items()}
    found["layers"] = {}
    for script in sorted(checkout.glob("run_pretrain_*.sh")):
        if told := re.search(r'--adapter_list "([\d,]+)"', script.read_text(encoding="utf-8")):
            found["layers"][script.name] = [int(each) for each in told[1].split(",")]
    return found
