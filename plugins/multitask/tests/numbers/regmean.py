"""What RegMean's authors make of three models of two linear layers and their data, all of sines, and their
option: ``python -m peftcore.testing.freeze regmean.py CHECKOUT``."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "bloomberg/dataless-model-merging", "92247ae", "src/model_merge/avg_merger.py")
VERSIONS = ("torch",)
CASES: dict[str, tuple[float, bool, list[float] | None]] = {
    "mostly whole": (0.875, False, None),
    "whole": (-1.0, False, None),
    "diagonal": (-1.0, True, None),
    "weighted": (0.125, False, [0.5, 0.125, 0.375]),
}
"""regmean_reduce_nondiag, regmean_diag, and coefficients of the models: as float32, the code's, has them exactly."""


class Toy(nn.Module):
    """Two linear maps with a bend between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def wave(shape: Sequence[int], k: float) -> Tensor:
    """Returns sin(k), sin(2 k), ... in a shape."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * k + k).view(tuple(shape))


def notebook(file: Path) -> dict[str, Any]:
    """Returns what the authors' notebook defines for its matrices of inputs."""
    cells = ["".join(cell["source"]) for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]
    found: dict[str, Any] = {"re": re, "torch": torch, "nn": nn, "tqdm": lambda steps, **_: steps}
    for cell in cells:
        if re.match(r"def (filter_|compute_gram)", cell):
            exec(compile(cell, str(file), "exec"), found)
    return found


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns the tensors of the merged model, flat. Task t has two batches [2, 7, 4] and [3, 2, 4]."""
    merging = load(checkout / SOURCE.script, root=checkout)
    compute_gram = notebook(checkout / "regmean_demo.ipynb")["compute_gram"]
    models = [Toy().double() for _ in range(3)]
    every = []
    for t, model in enumerate(models):
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(wave(parameter.shape, 0.7 + 0.31 * t + 0.17 * k))
        batches = [{"x": wave((*shape, 4), 0.9 + 0.41 * t)} for shape in ((2, 7), (3, 2))]
        trainer = SimpleNamespace(get_train_dataloader=lambda b=batches: b, _prepare_inputs=lambda batch: batch)
        every.append(compute_gram(model, trainer))
    found = {}
    for case, (off_diagonal, diagonal, weights) in CASES.items():
        config = SimpleNamespace(
            exclude_param_regex=[],
            regmean_exclude_param_regex=[],
            regmean_diag=diagonal,
            regmean_reduce_nondiag=off_diagonal,
        )
        kind = SimpleNamespace(task_type="classification")
        locals_ = [SimpleNamespace(base=model, model_config=kind) for model in models]
        merged = Toy().double()
        merger = merging.FedAvgMerger(None, config, locals_, SimpleNamespace(base=merged))
        merger.merge_to_global(model_coeffs=weights, all_grams=every)
        found[case] = {name: value.flatten().tolist() for name, value in merged.named_parameters()}
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the option of their configuration for named entities in DeBERTa: the value of their notebook, too."""
    file = checkout / "src/configs/exps/deberta/ner/ood/deberta-ner-regmean.yaml"
    return {"off_diagonal": yaml.safe_load(file.read_text())["merger"]["regmean_reduce_nondiag"]}
