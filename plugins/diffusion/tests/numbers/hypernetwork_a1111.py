"""What the webui's own networks and attention compute in a UNet of diffusers, with gradients, what networks start from,
what trains, and defaults: ``python -m peftcore.testing.freeze hypernetwork_a1111.py CHECKOUT``.

The webui's other modules, which its file imports, are not needed and stand empty.
"""

import contextlib
import inspect
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "AUTOMATIC1111/stable-diffusion-webui", "3157fe2", "modules/hypernetworks/hypernetwork.py")
VERSIONS = ("torch", "diffusers")
UNETS = SimpleNamespace(**run_path(str(Path(__file__).with_name("controlnext.py"))))
SIZES = (8, 14, 16)
"""Widths of contexts in that UNet."""
CASES: dict[str, dict[str, Any]] = {
    "linear": {"structure": [1, 2, 1], "activation": "linear", "norm": False, "activate_output": False, "scale": 0.7},
    "deep": {"structure": [1, 1.5, 2, 1], "activation": "swish", "norm": True, "activate_output": True, "scale": 1.0},
}
"""The second one trains, which the strength says nothing about."""
STARTS = {
    "normal": "Normal",
    "xavier_uniform": "XavierUniform",
    "xavier_normal": "XavierNormal",
    "kaiming_uniform": "KaimingUniform",
    "kaiming_normal": "KaimingNormal",
}
"""Our names of starts, and theirs."""
START: dict[str, Any] = {"structure": [1, 5000, 1], "activation": "leakyrelu", "norm": True}
"""A network with enough numbers to compare, but for the norm behind its last layer."""
ABSENT = (
    *(
        f"modules.{name}"
        for name in ("images", "devices", "processing", "sd_models", "shared", "sd_samplers", "hashes")
    ),
    *(f"modules.textual_inversion{name}" for name in ("", ".textual_inversion", ".dataset", ".learn_schedule")),
    *("modules.sd_hijack_checkpoint", "ldm", "ldm.util"),
)


class Processor:
    """Attention of diffusers, as the webui computes it."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **rest: Any) -> Any:
        names = ("heads", "scale", "to_q", "to_k", "to_v")
        parts = {name: getattr(attn, name) for name in names}
        attention = SimpleNamespace(**parts, to_out=nn.Sequential(*attn.to_out))
        return self.theirs.attention_CrossAttention_forward(attention, hidden_states, encoder_hidden_states)


def webui(checkout: Path) -> Any:
    """The module of their file."""
    theirs = load(checkout / SOURCE.script, checkout, ABSENT)
    theirs.devices.device = "cpu"
    return theirs


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns by case outputs, gradients of latents, and traces of those of the text and of all tensors."""
    import diffusers

    theirs = webui(checkout)
    theirs.devices.cond_cast_unet = theirs.devices.cond_cast_float = lambda x: x
    theirs.default = lambda value, other: other if value is None else value
    found = {}
    for case, options in CASES.items():
        model = diffusers.UNet2DConditionModel(**UNETS.UNET).double().requires_grad_(False)
        UNETS.filled(list(model.parameters()), 0.0, UNETS.DEVIATION)
        model.set_attn_processor(Processor(theirs))
        network = theirs.Hypernetwork(
            "name",
            SIZES,
            options["structure"],
            options["activation"],
            "Normal",
            options["norm"],
            activate_output=options["activate_output"],
        )
        network.set_multiplier(options["scale"])
        modules = [each.double() for size in SIZES for each in network.layers[size]]
        parameters = [each for module in modules for each in module.parameters()]
        UNETS.filled(parameters, 1000.0)
        network.train()
        if options["scale"] != 1:
            for module in modules:
                module.eval()
        theirs.shared.loaded_hypernetworks = [network]
        inputs = UNETS.given()
        sample, text = (inputs[name].requires_grad_() for name in ("sample", "encoder_hidden_states"))
        output = model(**inputs).sample
        (output * UNETS.wave(*output.shape, phase=6.0)).sum().backward()
        found[case] = {
            "output": output.flatten().tolist(),
            "sample": sample.grad.flatten().tolist(),
            "traces": UNETS.traces([text.grad, *(each.grad for each in parameters)]),
        }
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns for each way to start what weights and biases are drawn from: of the first layer, of the norm behind it,
    and of the last layer."""
    kind, found = webui(checkout).HypernetworkModule, {}
    structure, activation, norm = START.values()
    for ours, name in STARTS.items():
        network = kind(SIZES[0], None, structure, activation, name, norm)
        found[ours] = [drawn(each) for each in [*network.parameters()][:6]]
    return found


def trains(checkout: Path) -> dict[str, list[int]]:
    """Returns sizes of what their training gives to the optimizer, when it has loaded what they make, in their order,
    by the width of contexts."""
    theirs, given = webui(checkout), MagicMock(side_effect=StopIteration)
    theirs.optimizer_dict = {"AdamW": given}
    theirs.modules.textual_inversion = MagicMock()
    wanted = inspect.signature(theirs.train_hypernetwork).parameters
    with TemporaryDirectory() as folder:
        theirs.shared.cmd_opts.hypernetwork_dir = folder
        theirs.shared.hypernetworks = {"style": f"{folder}/style.pt"}
        theirs.create_hypernetwork("style", SIZES, False, "1, 2, 1", "linear", "Normal")
        told = {"hypernetwork_name": "style", "data_root": "", "log_directory": folder, "steps": 1}
        told |= {"save_hypernetwork_every": 0, "create_image_every": 0}
        with contextlib.suppress(StopIteration):
            theirs.train_hypernetwork(**{**dict.fromkeys(wanted, MagicMock()), **told})
    (network,) = theirs.shared.loaded_hypernetworks
    optimized = {id(each) for each in given.call_args.kwargs["params"] if each.requires_grad}
    return {
        str(size): [each.numel() for layer in layers for each in layer.parameters() if id(each) in optimized]
        for size, layers in network.layers.items()
    }


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns what a new network is by default, and as how deep a file is read that does not say it."""
    theirs = webui(checkout)
    new, read = theirs.Hypernetwork(), theirs.Hypernetwork()
    with TemporaryDirectory() as folder:
        torch.save({}, f"{folder}/old.pt")
        read.load(f"{folder}/old.pt")
    start = inspect.signature(theirs.HypernetworkModule).parameters["weight_init"].default
    return {
        "scale": theirs.HypernetworkModule(2, layer_structure=read.layer_structure).multiplier,
        "structure": read.layer_structure,
        "activation": new.activation_func or "linear",
        "activate_output": new.activate_output,
        "norm": new.add_layer_norm,
        "dropout": max(new.dropout_structure),
        "start": next(ours for ours, name in STARTS.items() if name == start),
    }
