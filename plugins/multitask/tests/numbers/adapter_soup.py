"""What the mean of three adapters by AdapterHub's `adapters` gives in two small hosts, in float64, all numbers waves:
``python -m peftcore.testing.freeze adapter_soup.py CHECKOUT``.

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

SOURCE = Source("adapters 1.3", "adapter-hub/adapters", "88f18eb", "src/adapters/model_mixin.py")
VERSIONS = ("adapters", "transformers", "torch")
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16}
IDS = [[1, 5, 3, 9, 2], [4, 4, 10, 0, 7]]
MIXES = {"mean": None, "weighted": [0.2, 1.1, -0.4]}


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


@torch.no_grad()
def waves(tensors: Iterable[Tensor], start: float) -> None:
    for index, tensor in enumerate(tensors):
        tensor.copy_(0.5 * wave(tensor, start + 0.37 * index))


def numbers(checkout: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the output, ``[2, 5, 8]``, and gradients of all tensors of the mean, flat, by the methods', the hosts'
    and the weights' names; in training, without dropout. Weights are used as they are."""
    import adapters
    import transformers
    from adapters import DoubleSeqBnConfig, LoRAConfig

    assert Path(adapters.__file__).is_relative_to(checkout.resolve())
    torch.set_default_dtype(torch.float64)  # of the adapter that is made
    configs = {
        "houlsby_adapter": DoubleSeqBnConfig(reduction_factor=2),
        "lora": LoRAConfig(r=2, alpha=3, attn_matrices=["q", "v"]),
    }
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for method, config in configs.items():
        for host in ("bert", "llama"):
            for mix, weights in MIXES.items():
                model: Any
                if host == "bert":
                    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
                    model = transformers.BertModel(transformers.BertConfig(**SIZES, **without), add_pooling_layer=False)
                else:
                    model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES))
                waves(model.parameters(), 0.1)
                adapters.init(model)
                for k, name in enumerate("abc"):
                    model.add_adapter(name, config=config)
                    waves((p for key, p in model.named_parameters() if f".{name}." in key), 0.2 + k)
                model.average_adapter("soup", list("abc"), weights, normalize_weights=False)
                model.train_adapter("soup")
                y = model.train()(input_ids=torch.tensor(IDS))[0]
                (y.square() * wave(y, 0.3)).sum().backward()
                own = {name: rounded(p.grad) for name, p in model.named_parameters() if ".soup." in name}
                found.setdefault(method, {}).setdefault(host, {})[mix] = {"output": rounded(y), "gradients": own}
    return found


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]
