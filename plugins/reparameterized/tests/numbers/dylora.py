"""What DyLoRA's authors' own layer computes at each rank, its gradients, what it starts from, and what their script
trains with which options: ``python -m peftcore.testing.freeze dylora.py CHECKOUT``."""

import importlib
import logging
import os
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags

SOURCE = Source("authors", "huawei-noah/Efficient-NLP", "bb44348", "DyLoRA/loralib/layers.py")
VERSIONS = ("torch", "transformers")
INPUTS, OUTPUTS, RANK, ALPHA = 6, 5, 4, 3
EXAMPLE = "DyLoRA/examples/NLU"
SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def wave(*shape: int) -> Tensor:
    """Numbers that everybody can make again."""
    return torch.sin(torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) ** 1.5).view(shape)


def tensors() -> dict[str, Tensor]:
    """Returns the weight and the bias of a layer, both factors, and an input."""
    layer = {"weight": (OUTPUTS, INPUTS), "bias": (OUTPUTS,)}
    shapes = layer | {"A": (RANK, INPUTS), "B": (OUTPUTS, RANK), "x": (3, INPUTS)}
    return {name: wave(*shape) / (index + 1) for index, (name, shape) in enumerate(shapes.items())}


def run(layers: Any, rank: int, frozen: bool, training: bool) -> dict[str, list[Any]]:
    given = tensors()
    layer = layers.Linear(INPUTS, OUTPUTS, r=RANK, lora_alpha=ALPHA, merge_weights=False).double()
    with torch.no_grad():
        for name, own in (("weight", layer.weight), ("bias", layer.bias), ("A", layer.lora_A), ("B", layer.lora_B)):
            own.copy_(given[name])
    layer.set_rank(rank - 1, frozen=frozen)  # theirs counts from 0
    layer.nd_lora_A.training = layer.nd_lora_B.training = training
    x = given["x"].requires_grad_()
    output = layer(x)
    (output * wave(*output.shape)).sum().backward()
    grads = {"A": layer.lora_A.grad, "B": layer.lora_B.grad, "x": x.grad}
    return {"output": output.tolist(), **{name: grad.tolist() for name, grad in grads.items()}}


def imported(checkout: Path) -> Any:
    """Returns their module of layers."""
    package = ModuleType("theirs")  # their __init__ wants a file of loralib that is not beside it
    package.__path__ = [str(checkout / Path(SOURCE.script).parent)]
    sys.modules["theirs"] = package
    return importlib.import_module("theirs.layers")


def numbers(checkout: Path) -> dict[str, dict[str, list[Any]]]:
    """Returns outputs and gradients at each rank: frozen and not in training, and afterwards."""
    layers = imported(checkout)
    modes = {"frozen": (True, True), "whole": (False, True), "evaluated": (True, False)}
    return {f"{mode} {rank}": run(layers, rank, *how) for mode, how in modes.items() for rank in range(1, RANK + 1)}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what a layer ``[20, 5000]`` starts from at rank 8."""
    layer = imported(checkout).Linear(5000, 20, r=8)
    return {"A": drawn(layer.lora_A), "B": drawn(layer.lora_B)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns what the lines of their script leave to train of a small RoBERTa with their layers, by name: how many
    numbers."""
    layers, source = imported(checkout), checkout / EXAMPLE / "examples/text-classification/run_glue.py"
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=9, **SIZES))
    attention = model.roberta.encoder.layer[0].attention.self
    attention.query, attention.value = (layers.Linear(8, 8, r=2) for _ in range(2))
    text = source.read_text(encoding="utf-8")
    lines = text[text.index("    trainable_params = []") : text.index("    # Preprocessing the datasets")]
    told = SimpleNamespace(apply_lora=True, lora_path=None, apply_adapter=False, apply_bitfit=False)
    space = {"model_args": told, "model": model, "logger": logging, "os": os, "torch": torch}
    exec(compile(textwrap.dedent(lines), str(source), "exec"), space)
    return {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their command for MNLI, and the dropout of the layer, which it leaves as it is."""
    found = flags((checkout / EXAMPLE / "roberta_base_mnli.sh").read_text())
    layer = imported(checkout).Linear(4, 4, r=found["lora_r"])
    dropped = isinstance(layer.lora_dropout, torch.nn.Dropout)
    return {"rank": found["lora_r"], "alpha": found["lora_alpha"], "dropout": layer.lora_dropout.p if dropped else 0.0}
