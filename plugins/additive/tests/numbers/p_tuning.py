"""The prompt that the LSTM of P-tuning's authors makes, and its gradients, on tensors of sines, its
start, what trains, and its options: ``python -m peftcore.testing.freeze p_tuning.py CHECKOUT``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "THUDM/P-tuning", "f4225d4", "LAMA/p_tuning/prompt_encoder.py")
VERSIONS = ("torch",)
TEMPLATE, WIDTH = (2, 1, 2), 16


def wave(shape: Sequence[int], k: float) -> Tensor:
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * k + k).view(*shape)


def renamed(name: str) -> str:
    """A name of theirs, as it is here."""
    return {"embedding.weight": "start"}.get(name, name).replace("lstm_head", "lstm").replace("mlp_head", "head")


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the rows ``[5, 16]`` and all gradients, flat."""
    encoder: Any = load(checkout / SOURCE.script, root=checkout / "LAMA").PromptEncoder
    told = SimpleNamespace(lstm_dropout=0.0)
    model = encoder(TEMPLATE, WIDTH, None, "cpu", told).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(wave(parameter.shape, 0.31 + 0.11 * index) / 2)
    rows = model()
    (rows * wave(rows.shape, 0.23)).sum().backward()
    return {
        "rows": rows.flatten().tolist(),
        "gradients": {renamed(name): each.grad.flatten().tolist() for name, each in model.named_parameters()},
    }


def fresh(checkout: Path, rows: int, width: int) -> dict[str, Tensor]:
    """Returns the tensors of a new encoder, which their optimizer takes, by our names."""
    encoder: Any = load(checkout / SOURCE.script, root=checkout / "LAMA").PromptEncoder
    model = encoder((rows, 0, 0), width, None, "cpu", SimpleNamespace(lstm_dropout=0.0))
    return {renamed(name): each for name, each in model.named_parameters()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what an encoder 512 wide starts from, for 80 rows: the rows, the LSTM, and the layers behind it."""
    found, parts = fresh(checkout, 80, 512), ("start", "lstm", "head")
    of = {part: [each.flatten() for name, each in found.items() if name.split(".")[0] == part] for part in parts}
    return {part: drawn(torch.cat(each)) for part, each in of.items()}


def command(checkout: Path) -> Any:
    """Returns the module of their command."""
    return load(checkout / "LAMA/cli.py", root=checkout, absent=("LAMA.p_tuning.modeling", "LAMA.data_utils.vocab"))


class Chosen(Exception):
    """What trains is chosen."""


def trains(checkout: Path) -> dict[str, int]:
    """Returns what their trainer gives to its optimizer beside a frozen model, by our names: how many numbers."""
    module = command(checkout)
    encoder: Any = load(checkout / SOURCE.script, root=checkout / "LAMA").PromptEncoder
    told = SimpleNamespace(lstm_dropout=0.0, use_lm_finetune=False, lr=1e-5, weight_decay=0.0)
    model, given = encoder(TEMPLATE, WIDTH, None, "cpu", told), []

    def optimizer(groups: list[dict[str, Any]], **options: Any) -> None:
        given.extend(each for group in groups for each in group["params"])
        raise Chosen

    with patch.object(torch.optim, "Adam", optimizer):
        try:
            module.Trainer.train(SimpleNamespace(model=SimpleNamespace(prompt_encoder=model), args=told))
        except Chosen:
            names = {parameter: renamed(name) for name, parameter in model.named_parameters()}
            return {names[each]: each.numel() for each in given}
    raise AssertionError("it did not come to an optimizer")


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of a command that names none, and the network of an encoder of width 16."""
    module = command(checkout)
    with patch.object(sys, "argv", ["cli.py"]):
        told = module.construct_generation_args()
    encoder: Any = load(checkout / SOURCE.script, root=checkout / "LAMA").PromptEncoder
    model = encoder(told.template, WIDTH, None, "cpu", told)
    lstm = model.lstm_head
    found = {"length": len(model.embedding.weight), "encoder": type(lstm).__name__.lower()}
    return {**found, "hidden": lstm.hidden_size, "lstm_dropout": lstm.dropout}
