"""Which weights of a tiny model are in the child network of Child-Tuning_D's authors, what trains whole, and their
command's options: ``python -m peftcore.testing.freeze child_tuning_d.py CHECKOUT``."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import flags, load
from peftcore.testing.hosts import HOSTS

SOURCE = Source("authors", "RunxinXu/ChildTuning", "d0d8655", "ChildTuningD.py")
VERSIONS = ("torch", "transformers", "numpy")
ABSENT = ("transformers.deepspeed", "transformers.trainer_utils")
ASKED = ("is_sagemaker_dp_enabled", "is_apex_available", "is_torch_tpu_available", "is_fairscale_available")


def wave(*shape: int, step: float) -> Tensor:
    return torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) ** 1.5).view(shape)


class Stack(nn.Module):
    """An embedder, two layers that double what they read in training, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Linear(4, 6)
        self.layer = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.classifier = nn.Linear(6, 3)
        with torch.no_grad():
            for index, parameter in enumerate(self.double().parameters()):
                parameter.copy_(wave(*parameter.shape, step=0.3 + 0.1 * index))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embedder(x)
        for linear in self.layer:
            x = torch.tanh(linear(2 * x if self.training else x))
        return {"loss": nn.functional.cross_entropy(self.classifier(x), labels)}


def chosen(module: Any, model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the masks by name, of a child of 30 percent."""
    options = {"per_device_train_batch_size": 1, "dataloader_drop_last": False, "dataloader_num_workers": 0}
    trainer = SimpleNamespace(
        model=model,
        train_dataset=data,
        data_collator=lambda batch: {"idx": 0, **batch[0]},
        args=SimpleNamespace(**options, dataloader_pin_memory=False, max_grad_norm=1.0),
        reserve_p=0.3,
        _prepare_inputs=lambda inputs: inputs,
    )
    masks = module.ChildTuningDtrainer.calculate_fisher(trainer)
    return {name: masks[parameter] for name, parameter in model.named_parameters() if parameter in masks}


def theirs(checkout: Path) -> Any:
    assert transformers.Trainer
    names = {name: MagicMock(return_value=False) for name in ASKED}
    sys.modules["transformers.file_utils"] = sys.modules["transformers.integrations"] = MagicMock(**names)
    return load(checkout / SOURCE.script, absent=ABSENT)


def numbers(checkout: Path) -> dict[str, list[int]]:
    """Returns the places of the child's numbers in each tensor, ascending."""
    xs = [wave(5, 4, step=0.7 + index) * (1 + 3 * index) for index in range(4)]
    child = chosen(theirs(checkout), Stack().eval(), [{"x": x, "labels": torch.arange(5) % 3} for x in xs])
    return {name: mask.flatten().nonzero().flatten().tolist() for name, mask in child.items()}


def trains(checkout: Path) -> dict[str, list[str]]:
    """Returns the names of what their optimizer masks of a tiny BERT, and of what it does not."""
    bert, inputs = HOSTS["bert"].build()
    masked = chosen(theirs(checkout), bert, [{**inputs, "labels": torch.tensor([0, 2])}])
    return {"child": list(masked), "whole": [name for name, _ in bert.named_parameters() if name not in masked]}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their command, which leaves the norm to transformers."""
    options = flags((checkout / "run.sh").read_text())
    return {"share": options["reserve_p"], "max_grad_norm": transformers.TrainingArguments.max_grad_norm}
