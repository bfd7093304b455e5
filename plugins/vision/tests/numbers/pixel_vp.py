"""What the prompters of visual prompting's authors add to pictures, and what a small transformer makes of these, with
derivatives, on tensors of cosines: ``python -m peftcore.testing.freeze pixel_vp.py CHECKOUT``."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import timm
import torch
from vpt import wave

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "hjbahng/visual_prompting", "679e71f", "models/prompters.py")
VERSIONS = ("torch", "timm", "numpy")
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
