"""What the layer of MTL-LoRA's authors gives for rows of two tasks, on tensors of sines; what it starts from and
trains, and their options: ``python -m peftcore.testing.freeze mtl_lora.py CHECKOUT``."""

import ast
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "pUmpKin-Co/MTL-LoRA", "7848a70", "src/adapter/mlora.py")
VERSIONS = ("torch",)
ABSENT = ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.zero.partition_parameters")


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns the output, and the gradients of both factors, of the tasks' matrices and logits and of the input, all
    flat: with whole matrices and with diagonals. In training, half of the input dropped, torch's generator at 0. The
    softmax is in float32."""
    module = load(checkout / SOURCE.script, root=checkout / "src", absent=ABSENT)
    found = {}
    for kind, shape in {"full": (4, 2, 2), "diagonal": (4, 2)}.items():
        layer = module.mLoRALinear(
            5, 4, 3, 4, kind == "diagonal", B_scale=0.5, r=2, lora_alpha=3, lora_dropout=0.5
        ).double()
        with torch.no_grad():
            layer.weight.copy_(wave(4, 5, step=1.1))
            layer.bias.copy_(wave(4, step=1.3))
            layer.lora_A.copy_(wave(1, 2, 5, step=1.7))
            layer.lora_B.copy_(wave(3, 4, 2, step=2.3))
            layer.lora_lambdas.copy_(wave(*shape, step=0.7))
            layer.lora_B_w.copy_(wave(4, 3, step=1.9))
        x = wave(2, 3, 5, step=0.9).requires_grad_()
        torch.manual_seed(0)
        y = layer(x, torch.tensor([2, 0]))
        (y * wave(2, 3, 4, step=0.3)).sum().backward()
        parts = {"y": y, "A": layer.lora_A.grad, "B": layer.lora_B.grad, "middle": layer.lora_lambdas.grad}
        parts |= {"logits": layer.lora_B_w.grad, "x": x.grad}
        found[kind] = {name: tensor.flatten().tolist() for name, tensor in parts.items()}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what A of 2000 inputs, and the logits of 2000 tasks, are drawn from, at rank 20 and with 20 B; B; and the
    matrices of two tasks at rank 3, which their script has whole, and the diagonals."""
    module = load(checkout / SOURCE.script, root=checkout / "src", absent=ABSENT)
    large = module.mLoRALinear(2000, 4, 20, 2000, True, r=20)
    small = {kind: module.mLoRALinear(5, 4, 1, 2, kind == "diagonal", r=3) for kind in ("full", "diagonal")}
    found = {"A": large.lora_A, "B": large.lora_B, "logits": large.lora_B_w}
    return {name: drawn(each) for name, each in found.items()} | {
        kind: each.lora_lambdas.tolist() for kind, each in small.items()
    }


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train of a layer ``[4, 5]`` in a model, for two tasks, with 3 B of rank 2."""
    load(checkout / SOURCE.script, root=checkout / "src", absent=ABSENT)
    utils = load(checkout / "src/utils/peft_loading_utilts.py", root=checkout, absent=["src.custom_model"])
    model: Any = nn.Sequential(nn.Linear(5, 4))
    model.device, model.dtype = "cpu", torch.float32
    config = {"type": "mlora", "r": 2, "lambda_num": 2, "B_num": 3, "diagonal_format": False}
    utils.wrap_model(model, ["0"], config)
    utils.set_no_grad(model)
    names = {"lora_A": "A", "lora_B": "B", "lora_B_w": "logits", "lora_lambdas": "middle"}
    return {names[name.split(".")[1]]: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script as their README calls it, with the program's own where it says nothing; the
    form of the tasks' matrices is written in the program."""
    (call,) = (
        line.split("llama2_7B_mlora_qkvo.sh")[1].split()
        for line in (checkout / "README.md").read_text().splitlines()
        if "llama2_7B_mlora_qkvo.sh" in line
    )
    told = flags(
        (checkout / "script/llama2_7B_mlora_qkvo.sh").read_text().replace("$1", call[0]).replace("$2", call[1])
    )
    program = ast.parse((checkout / "mlora_finetune.py").read_text())
    form = [
        ast.literal_eval(value)
        for each in ast.walk(program)
        if isinstance(each, ast.Dict)
        for key, value in zip(each.keys, each.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "diagonal_format"
    ]
    parser = next(each for each in program.body if getattr(each, "name", "") == "arg_parser")
    parser.body[-1] = ast.parse("return parser").body[0]  # type: ignore[attr-defined]
    found: dict[str, Any] = {}
    exec(compile(ast.Module([ast.parse("import argparse, ast").body[0], parser], []), "arg_parser", "exec"), found)
    own = vars(found["arg_parser"]().parse_args([]))
    return {
        "rank": told["lora_r"],
        "alpha": told["lora_alpha"],
        "ups": told["num_B"],
        "temperature": told["temperature"],
        "dropout": told.get("lora_dropout", own["lora_dropout"]),
        "task_matrix": {(False,): "full", (True,): "diagonal"}[tuple(form)],
    }
