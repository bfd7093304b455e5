"""What T-LoRA's authors' own layers compute at several timesteps, their gradients, what they start from, what trains in
the UNet of the kit, and the options of the command in the README: ``python -m peftcore.testing.freeze tlora.py
CHECKOUT``."""

import ast
import gc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load
from peftcore.testing.hosts import HOSTS

SOURCE = Source("authors", "ControlGenAI/T-LoRA", "602c4f7", "tlora/model/lora.py")
VERSIONS = ("torch",)
INPUTS, OUTPUTS, RANK, MIN_RANK = 7, 6, 5, 2
KINDS = ("ortho_lora", "lortho_lora", "lora")
TIMESTEPS = {0: 1.0, 200: 2.0, 500: 1.0, 999: 1.0}
"""And the exponent of the rank at each."""
LAYERS, WIDE, NARROW, PART = 60, 200, 160, 128
"""How many layers are drawn, their sizes and rank."""
PARTS = ("principal", "last", "middle")
SIDE, FEW = 6, 3
"""The side of a square weight that is decomposed, and the rank, such that an odd number of values is left over."""


def wave(*shape: int) -> Tensor:
    """Numbers that everybody can make again."""
    return torch.sin(torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) ** 1.5).view(shape)


def tensors() -> dict[str, Tensor]:
    """Returns the factors and singular values, those that they started from, and an input."""
    shapes = {
        "A": (RANK, INPUTS), "B": (OUTPUTS, RANK), "values": (RANK,),
        "A0": (RANK, INPUTS), "B0": (OUTPUTS, RANK), "values0": (RANK,), "x": (2, 3, INPUTS),
    }  # fmt: skip
    return {name: wave(*shape) / (index + 1) for index, (name, shape) in enumerate(shapes.items())}


def layer_of(layers: Any, kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns a layer of theirs with these tensors in it, and what trains by our names."""
    given = tensors()
    if kind == "lora":
        layer = layers[kind](INPUTS, OUTPUTS, RANK).double()
        held = {"A": layer.down.weight, "B": layer.up.weight}
    else:
        base = [nn.Linear(INPUTS, OUTPUTS)] if kind == "lortho_lora" else []
        layer = layers[kind](*base, INPUTS, OUTPUTS, RANK).double()
        held = {"A": layer.q_layer.weight, "B": layer.p_layer.weight, "values": layer.lambda_layer}
        held |= {"A0": layer.base_q.weight, "B0": layer.base_p.weight, "values0": layer.base_lambda}
    with torch.no_grad():
        for name, own in held.items():
            own.copy_(given[name].view(own.shape))
    return layer, {name: own for name, own in held.items() if own.requires_grad}


def function(file: Path, name: str) -> Any:
    """Returns one function of a file that wants an older transformers."""
    every = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    (found,) = (node for node in every if isinstance(node, ast.FunctionDef) and node.name == name)
    space: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([found], []), str(file), "exec"), space)
    return space[name]


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns the update and gradients of each kind at each timestep."""
    sys.path.insert(0, str(checkout))
    from tlora.model.lora import lora_linear_layers

    mask_of = function(checkout / "tlora/model/pipeline_sdxl.py", "get_mask_by_timestep")
    found = {}
    for kind in KINDS:
        for timestep, power in TIMESTEPS.items():
            mask = mask_of(SimpleNamespace(max_rank=RANK), timestep, 1000, RANK, MIN_RANK, power)
            layer, held = layer_of(lora_linear_layers.classes, kind)
            x = tensors()["x"].requires_grad_()
            output = layer(x, mask.double())
            (output * wave(*output.shape)).sum().backward()
            grads = {name: own.grad.tolist() for name, own in held.items()}
            found[f"{kind} {timestep}"] = {"output": output.tolist(), "x": x.grad.tolist(), **grads}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what A and B are drawn from in each kind; the singular values of many layers, in one draw; and, of the
    decomposition of a wave, the singular values and the product of all three.

    Orthonormal ones are those of a square layer: of others theirs are columns, too, with which LAPACK fills up a basis.
    """
    layers = load(checkout / SOURCE.script, root=checkout).lora_linear_layers.classes
    gc.collect = lambda *_: 0  # after each layer
    plain = layers["lora"](WIDE, NARROW, NARROW)  # their trainer takes no more ranks than a layer has
    found: dict[str, Any] = {"zero": {"A": drawn(plain.down.weight), "B": drawn(plain.up.weight)}}
    for part in PARTS:
        many = [layers["ortho_lora"](WIDE, NARROW, PART, sig_type=part) for _ in range(LAYERS)]
        values = drawn(torch.stack([each.lambda_layer for each in many]))
        square = layers["ortho_lora"](WIDE, WIDE, PART, sig_type=part)
        factors = {"A": drawn(square.q_layer.weight), "B": drawn(square.p_layer.weight)}
        found[f"random {part}"] = {**factors, "values": values}
        base = nn.Linear(SIDE, SIDE).double()
        base.weight.data.copy_(wave(SIDE, SIDE))
        own = layers["lortho_lora"](base, SIDE, SIDE, FEW, sig_type=part)
        product = own.p_layer.weight * own.lambda_layer @ own.q_layer.weight
        found[f"weight {part}"] = {"values": own.lambda_layer[0].tolist(), "product": product.tolist()}
    return found


OURS = {"to_out_lora": "to_out.0", "q_layer.weight": "A", "p_layer.weight": "B", "lambda_layer": "values"}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of all that their optimizer is given, by our names, in the UNet of the kit at rank 4."""
    told = SimpleNamespace(trainer_type="ortho_lora", lora_rank=4, sig_type="last")
    absent = ("wandb", "tlora.model.pipeline_sdxl")
    trainer = load(checkout / "tlora/trainer_sdxl.py", root=checkout, absent=absent).TLoraTrainerSDXL(told)
    trainer.unet, trainer.accelerator = HOSTS["unet"].build()[0], MagicMock()
    trainer.vae = trainer.text_encoder = trainer.text_encoder_2 = nn.Linear(1, 1)
    trainer.setup_model()
    trained = {name: each for name, each in trainer.unet.named_parameters() if each.requires_grad}
    assert {*map(id, trained.values())} == {*map(id, trainer.params_to_optimize)}
    found = {}
    for name, each in trained.items():
        path, _, rest = name.partition(".processor.")
        projection, _, tensor = rest.partition(".")
        found[f"{path}.{OURS.get(projection, projection.removesuffix('_lora'))}.{OURS[tensor]}"] = each.numel()
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns what their parser makes of the README's command for SDXL."""
    _, _, text = (checkout / "README.md").read_text(encoding="utf-8").partition("accelerate launch train.py")
    given = flags(text.partition("```")[0])
    sys.argv = ["train.py", *(f"--{name}={value}" for name, value in given.items())]
    told = load(checkout / "train.py", absent=["tlora.trainer_sdxl"]).parse_args()
    started = {"ortho_lora": "random", "lortho_lora": "weight", "lora": "zero"}[told.trainer_type]
    ranks = {"rank": told.lora_rank, "min_rank": told.min_rank, "power": told.alpha_rank_scale}
    return {**ranks, "start": started, "part": told.sig_type}
