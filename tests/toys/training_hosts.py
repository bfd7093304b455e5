"""Tiny hosts with labels, rows of data for them, and Trainers that write little."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peftcore.testing.hosts import HOSTS, VOCABULARY

STEPS = 6


def host(name: str) -> nn.Module:
    """A seeded host of the kit."""
    torch.manual_seed(0)
    return HOSTS[name].build()[0]


def inputs(name: str) -> dict[str, torch.Tensor]:
    """The kit's inputs for it, always the same."""
    torch.manual_seed(0)
    return HOSTS[name].build()[1]


def rows(name: str, count: int = 12) -> list[dict[str, torch.Tensor]]:
    """Labelled rows: a class for BERT, the text itself for a language model."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(3, VOCABULARY, (5,), generator=generator)
        labels = torch.tensor(index % 3) if name == "bert" else ids
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    given: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**given, **changes})


def trainer(model: nn.Module, name: str, folder: Path, callbacks: list[Any], **changes: Any) -> transformers.Trainer:
    optimizers = changes.pop("optimizers", (None, None))
    made = transformers.Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=rows(name),
        eval_dataset=rows(name, 4),
        callbacks=callbacks,
        optimizers=optimizers,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    inner = [tensors(each) if isinstance(each, dict | tuple) else [each] for each in values]
    return [each for part in inner for each in part if isinstance(each, Tensor) and each.is_floating_point()]


class Squares(transformers.Trainer):
    """A Trainer for any output: its loss is the mean square."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return sum(each.float().square().mean() for each in tensors(model(**inputs)))

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None


class Bare(nn.Module):
    """A model that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.down(torch.tanh(self.up(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
