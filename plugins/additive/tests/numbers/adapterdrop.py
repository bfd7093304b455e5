"""What two small hosts give where AdapterHub's `adapters` leaves adapters out of the lowest layer, in float64, all
numbers waves: ``python -m peftcore.testing.freeze adapterdrop.py CHECKOUT``.

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

SOURCE = Source("adapters 1.3", "adapter-hub/adapters", "88f18eb", "src/adapters/methods/adapter_layer_base.py")
VERSIONS = ("adapters", "transformers", "torch")
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
    """Returns the output, ``[2, 5, 8]``, and gradients of the adapters that acted, flat, by what is left out and the
    hosts' names: the lowest layer gets no adapter ("specialised"), or both have one and so many are skipped ("robust
    0", "robust 1"); in training, without dropout. The adapter is Houlsby's at the feed-forward, with a relu."""
    import adapters
    import transformers
    from adapters import DoubleSeqBnConfig

    assert Path(adapters.__file__).is_relative_to(checkout.resolve())
    kinds: dict[str, tuple[list[int], list[int] | None]] = {"specialised": ([0], None)}
    kinds |= {"robust 0": ([], []), "robust 1": ([], [0])}
    found: dict[str, dict[str, Any]] = {}
    for kind, (left_out, skipped) in kinds.items():
        config = DoubleSeqBnConfig(mh_adapter=False, non_linearity="relu", reduction_factor=2, leave_out=left_out)
        for host in ("bert", "llama"):
            model: Any
            if host == "bert":
                without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
                model = transformers.BertModel(transformers.BertConfig(**SIZES, **without), add_pooling_layer=False)
            else:
                model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES))
            model = model.double()
            waves(model.parameters(), 0.1)
            adapters.init(model)
            model.add_adapter("trained", config=config)
            model.train_adapter("trained")
            model.set_active_adapters("trained", skip_layers=skipped)
            own = [(name, p) for name, p in model.double().named_parameters() if ".trained." in name]
            waves((p for _, p in own), 0.2)
            y = model.train()(input_ids=torch.tensor(IDS))[0]
            (y.square() * wave(y, 0.3)).sum().backward()
            found.setdefault(kind, {})[host] = {
                "output": rounded(y),
                "gradients": {name: rounded(p.grad) for name, p in own if p.grad is not None},
            }
    return found


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]
