"""Which weights of a tiny model the authors of FISH Mask keep, what trains, and the defaults of their arguments:
``python -m peftcore.testing.freeze fish_mask.py CHECKOUT``."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source(
    "authors", "varunnair18/FISH", "b5bff1e", "transformers/examples/text-classification/run_glue_sparse_update.py"
)
VERSIONS = ("torch",)
ABSENT = ("datasets", "transformers.trainer_utils", "custom_trainer")


class Stack(nn.Module):
    """A table that is tied to a map, a norm, a convolution and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.tied = nn.Linear(6, 7)
        self.tied.weight = self.table.weight
        self.norm = nn.LayerNorm(7)
        self.conv = nn.Conv1d(7, 4, 2)
        self.classifier = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.norm(torch.tanh(self.tied(self.dropout(self.table(ids)))))
        logits = self.classifier(torch.tanh(self.conv(x.mT)).mean(-1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def masks(checkout: Path) -> dict[str, Tensor]:
    """Returns the masks where a fifth of the 123 weights in front of the classifier is kept, by the gradients that
    labels give, squared, of six examples."""
    module = load(checkout / SOURCE.script, absent=ABSENT)
    torch.manual_seed(0)
    model = Stack().double().eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 6, (6, 1, 5), generator=generator)
    examples = [{"ids": each, "labels": torch.tensor([number % 3])} for number, each in enumerate(ids)]
    ratio = (123 // 5 + 15 + 0.5) / (123 + 15)  # theirs counts the 15 numbers of the classifier, which always train
    made = module.create_mask_gradient(model, examples, lambda batch: dict(batch[0]), 6, ratio, "label", "square")
    return dict(made)


def numbers(checkout: Path) -> list[int]:
    """Returns the places of what is kept in front of the classifier."""
    kept = [mask.flatten() for name, mask in masks(checkout).items() if not name.startswith("classifier")]
    found: list[int] = torch.cat(kept).nonzero().flatten().tolist()
    return found


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers of the classifier train, and of all else."""
    counts = {name: int(mask.sum()) for name, mask in masks(checkout).items()}
    head = sum(counts.pop(name) for name in ("classifier.weight", "classifier.bias"))
    return {"classifier": head, "else": sum(counts.values())}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of their arguments, by the names here."""
    arguments = load(checkout / SOURCE.script, absent=ABSENT).SparseUpdateTrainingArguments
    return {"share": arguments.keep_ratio, "samples": arguments.num_samples}
