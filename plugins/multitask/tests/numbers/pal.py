"""What the authors' BERT with projected attention layers computes for two tasks, in float64, all tensors sines:
``python -m peftcore.testing.freeze pal.py CHECKOUT``."""

from pathlib import Path

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "AsaCooperStickland/Bert-n-Pals", "9b40f4f", "modeling.py")
VERSIONS = ("torch",)
IDS = [[1, 5, 3, 9, 2], [4, 4, 10, 0, 0]]
MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view(like.shape)


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns by task the last states of tokens, ``[2, 5, 8]``, and the gradients of the table of words and of the
    task's own tensors, by their names; flat."""
    module = load(checkout / SOURCE.script, absent=["six"])
    config = module.BertConfig(**SIZES, **DROPOUT, pals=True, mult=True, num_tasks=2, hidden_size_aug=12)
    model = module.BertModel(config).double().train()
    tensors = dict(sorted(model.named_parameters()))
    with torch.no_grad():
        for index, tensor in enumerate(tensors.values()):
            tensor.copy_(0.5 * wave(tensor, 0.3 + 0.37 * index))
    ids, mask = torch.tensor(IDS), torch.tensor(MASK)
    found = {}
    for task in range(2):
        model.zero_grad()
        y = model(ids, attention_mask=mask, i=task)[0][-1]
        y = y * mask[..., None]  # what stands at padding nobody reads
        (y * wave(y, 0.3)).sum().backward()
        own = {name: p.grad for name, p in tensors.items() if f".multi_layers.{task}." in name or "word_emb" in name}
        found[str(task)] = {"y": rounded(y), **{name: rounded(grad) for name, grad in own.items()}}
    return found


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 10) for each in tensor.flatten().tolist()]
