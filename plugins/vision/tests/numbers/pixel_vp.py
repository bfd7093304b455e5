"""What the prompters of visual prompting's authors add to pictures, and what a small transformer makes of these, with
derivatives, on tensors of cosines, what the prompters start from, what trains, and the options of a command:
``python -m peftcore.testing.freeze pixel_vp.py CHECKOUT``."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import timm
import torch
from vpt import wave

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "hjbahng/visual_prompting", "679e71f", "models/prompters.py")
VERSIONS = ("torch", "timm", "numpy")
ABSENT = ("clip", "wandb", "torchvision.datasets")
KINDS = {"padding": "frame", "fixed_patch": "square", "random_patch": "random"}
PARTS = {f"pad_{side}": side for side in ("up", "down", "left", "right")} | {"patch": "square"}
SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def outputs(prompter: Any) -> dict[str, Any]:
    """Returns a channel of a prompted picture, logits ``[2, 3]`` and derivatives of a weighted sum of them."""
    model = timm.models.VisionTransformer(**SIZES).double().eval()
    for name, parameter in (*model.named_parameters(), *prompter.named_parameters()):
        parameter.data.copy_(wave(parameter.shape, name))
    images = wave((2, 3, 8, 8), "images").requires_grad_()
    prompted = prompter(images)
    logits = model(prompted)
    names, parameters = zip(*prompter.named_parameters(), strict=True)
    found = torch.autograd.grad((logits * wave((2, 3), "direction")).sum(), [*parameters, images])
    gradients = {name: each.tolist() for name, each in zip(names, found[:-1], strict=True)}
    gradients["images"] = found[-1][:, 0].tolist()
    return {"prompted": prompted[0, 0].tolist(), "logits": logits.tolist(), "gradients": gradients}


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the outputs of the three prompters; their tensors are put on no GPU, and the place is the first drawn."""
    module = load(checkout / SOURCE.script, root=checkout)
    torch.set_default_dtype(torch.float64)  # of their zeros
    try:
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            numpy.random.seed(1)
            kinds = {"frame": module.PadPrompter, "square": module.FixedPatchPrompter}
            kinds["random"] = module.RandomPatchPrompter
            return {
                shape: outputs(kind(SimpleNamespace(prompt_size=size, image_size=8)).double())
                for (shape, kind), size in zip(kinds.items(), (2, 3, 3), strict=True)
            }
    finally:
        torch.set_default_dtype(torch.float32)


def start(checkout: Path) -> dict[str, Any]:
    """Returns what each tensor of the three prompters starts from, of squares as large as need be."""
    module, found = load(checkout / SOURCE.script, root=checkout), {}
    for name, shape in KINDS.items():
        size = 30 if shape == "frame" else 120
        prompter = vars(module)[name](SimpleNamespace(prompt_size=size, image_size=224))
        found |= {f"{shape}.{PARTS[part]}": drawn(each) for part, each in prompter.named_parameters()}
    return found


class Made(Exception):
    """The optimizer was made."""


def trains(checkout: Path) -> dict[str, list[int]]:
    """Returns the shapes of what their optimizer is given, by the prompter that a command names."""
    main, found = load(checkout / "main_clip.py", absent=ABSENT), {}
    main.clip.load.return_value = torch.nn.Linear(2, 2), None
    for name, shape in KINDS.items():
        with (
            mock.patch.object(sys, "argv", ["main_clip.py", "--method", name]),
            mock.patch.object(main, "DataLoader"),
            mock.patch.object(main, "refine_classname", list),
            mock.patch.object(main.torch.optim, "SGD", side_effect=Made) as made,
        ):
            try:
                main.main()
            except Made:
                found[shape] = [[*each.shape[1:]] for each in made.call_args.args[0]]
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options that a command has which names none."""
    main = load(checkout / "main_clip.py", absent=ABSENT)
    with mock.patch.object(sys, "argv", ["main_clip.py"]):
        told = main.parse_option()
    return {"shape": KINDS[told.method], "size": told.prompt_size, "picture": [told.image_size] * 2}
