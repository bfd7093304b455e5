"""What the webui's own networks and attention compute in a UNet of diffusers, with gradients:
``python -m peftcore.testing.freeze hypernetwork_a1111.py CHECKOUT``.

The webui's other modules, which its file imports, are not needed and stand empty.
"""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

from torch import nn

from peftcore.registry.evidence import Source
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
ABSENT = (
    *(f"modules.{name}" for name in ("devices", "processing", "sd_models", "shared", "sd_samplers", "hashes")),
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


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns by case outputs, gradients of latents, and traces of those of the text and of all tensors."""
    import diffusers

    theirs = load(checkout / SOURCE.script, checkout, ABSENT)
    theirs.devices.device = "cpu"
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
