"""What ControlNeXt's own UNets and networks compute, with gradients: ``python -m peftcore.testing.freeze controlnext.py
CHECKOUT``.

Their networks end at the width of Stable Diffusion; here the last convolution is another one, of the width of the UNet.
"""

from pathlib import Path
from runpy import run_path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "dvlab-research/ControlNeXt", "ab4b3ac", "ControlNeXt-SD1.5-Training/models/unet.py")
VERSIONS = ("torch", "diffusers")
SCALE, WIDTH, DEVIATION = 0.7, 8, 0.4
UNET: dict[str, Any] = {
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (WIDTH, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 14,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
CASES = {
    "sd15": ("SD1.5", "controlnext.py", "ControlNeXtModel", "output", "conditional_controls"),
    "sdxl": ("SDXL", "controlnet.py", "ControlNetModel", "out", "controls"),
}
"""Model, file and class of the network, the key of its output, and the argument of the UNet."""


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers that everybody can make again."""
    return (torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) ** 1.5 + phase).sin().view(shape)


@torch.no_grad()
def filled(parameters: list[nn.Parameter], start: float, deviation: float = 0.1) -> None:
    """Fill all tensors with waves of that deviation, gains of norms too."""
    for number, parameter in enumerate(parameters):
        parameter.copy_(deviation * 2**0.5 * wave(*parameter.shape, phase=start + number))


def given() -> dict[str, Any]:
    """Latents, timesteps and text."""
    text = wave(2, 5, 14, phase=2.0)
    return {"sample": wave(2, 2, 8, 8, phase=1.0), "timestep": torch.tensor([3, 500]), "encoder_hidden_states": text}


def image() -> Tensor:
    """Two pictures, 8 times as large as the latents."""
    return wave(2, 3, 64, 64, phase=4.0)


def traces(gradients: list[Tensor | None]) -> list[list[float]]:
    """Two numbers of each gradient: along a wave, and its length."""
    found = []
    for each in gradients:
        assert each is not None
        found.append([(each * wave(*each.shape, phase=5.0)).sum().item(), each.norm().item()])
    return found


def near(found: Tensor, expected: Any) -> bool:
    """Whether numbers are those, which are not zero."""
    wanted = torch.tensor(expected, dtype=torch.float64).flatten()
    return bool(wanted.abs().max() > 1e-3) and torch.allclose(found.flatten(), wanted, rtol=1e-9, atol=1e-11)


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns by case how many numbers their network has, outputs, gradients of latents, and traces of others."""
    found = {}
    for case, (base, file, kind, key, argument) in CASES.items():
        folder = checkout / f"ControlNeXt-{base}-Training" / "models"
        unet = run_path(str(folder / "unet.py"))["UNet2DConditionModel"](**UNET).double().train()
        network = run_path(str(folder / file))[kind]()
        count = sum(each.numel() for each in network.parameters())
        network.mid_convs[1] = nn.Conv2d(256, WIDTH, 1)
        network.double().train()
        filled(list(unet.parameters()), 0.0, DEVIATION)
        filled(list(network.parameters()), 1000.0)
        inputs, picture = given(), image().requires_grad_()
        inputs["sample"].requires_grad_()
        control = {"scale": SCALE, key: network(picture, inputs["timestep"])[key]}
        output = unet(**inputs, **{argument: control}).sample
        (output * wave(*output.shape, phase=6.0)).sum().backward()
        trained = [each for name, each in unet.named_parameters() if "to_out" in name]  # the pattern of their scripts
        found[case] = {
            "count": count,
            "output": output.flatten().tolist(),
            "sample": inputs["sample"].grad.flatten().tolist(),
            "traces": traces([picture.grad, *(each.grad for each in [*network.parameters(), *trained])]),
            "trained": [name for name, each in unet.named_parameters() if "to_out" in name],
        }
    return found
