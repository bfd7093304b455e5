"""What ControlNeXt's own UNets and networks compute, with gradients, what networks start from, what their script trains
and its options: ``python -m peftcore.testing.freeze controlnext.py CHECKOUT``.

Their networks end at the width of Stable Diffusion; here the last convolution is another one, of the width of the UNet.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

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

WIDE = {**UNET, "block_out_channels": (320, 16)}
"""A UNet of which the first block is as wide as that of Stable Diffusion."""
STARTS: dict[str, Any] = {"networks": 100, "last": 64, "enough": 5000}
"""Networks whose starts are compared, their last width, and the numbers of a tensor that a single network need have."""
ABSENT = ("cv2", "datasets", "pipeline", "pipeline.pipeline_controlnext")


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


def pooled(networks: Iterable[list[Tensor]]) -> list[Tensor]:
    """Returns the values of each tensor, of all networks together where one of them has too few to compare."""
    first, *others = networks
    small = [place for place, each in enumerate(first) if each.numel() < STARTS["enough"]]
    for place in small:
        first[place] = torch.cat([each[place].detach().flatten() for each in (first, *others)])
    return first


def start(checkout: Path) -> dict[str, Any]:
    """Returns by their names what the tensors of a network are drawn from."""
    network = run_path(str(checkout / "ControlNeXt-SD1.5-Training/models/controlnext.py"))["ControlNeXtModel"]
    last = STARTS["last"]
    made = (network(time_embed_dim=last, out_channels=[128, last]) for _ in range(STARTS["networks"]))
    names = [name for name, _ in network(time_embed_dim=last, out_channels=[128, last]).named_parameters()]
    return dict(zip(names, map(drawn, pooled([*each.parameters()] for each in made)), strict=True))


def script(checkout: Path) -> Any:
    """The module of their script."""
    root = checkout / "ControlNeXt-SD1.5-Training"
    return load(root / "train_controlnext.py", root, ABSENT)


def optimized(checkout: Path) -> tuple[Any, nn.Module, Any]:
    """Returns options of their script, a tiny UNet, and the optimizer that the script makes for it and a network."""
    authors, made, optimizer = script(checkout), [], torch.optim.AdamW
    unet = authors.UNet2DConditionModel(**WIDE)

    def optimize(*given: Any, **options: Any) -> Any:
        made.append(optimizer(*given, **options))
        return made[-1]

    names = ("AutoTokenizer", "import_model_class_from_model_name_or_path", "DDPMScheduler", "AutoencoderKL")
    mocks: dict[str, Any] = {name: MagicMock() for name in names}
    mocks["make_train_dataset"] = MagicMock(side_effect=StopIteration)  # which comes after the optimizer
    with TemporaryDirectory() as folder:
        told = ["--pretrained_model_name_or_path=tiny", "--dataset_name=none", f"--output_dir={folder}"]
        args = authors.parse_args(told)
        args.report_to = None
        with (
            patch.multiple(authors, **mocks),
            patch.object(authors.UNet2DConditionModel, "from_pretrained", return_value=unet),
            patch.object(torch.optim, "AdamW", optimize),
            suppress(StopIteration),
        ):
            authors.main(args)
    return args, unet, made[0]


def trains(checkout: Path) -> dict[str, Any]:
    """Returns sizes of what trains of the network, names and sizes of what trains of the UNet."""
    _, unet, optimizer = optimized(checkout)
    names = {id(each): name for name, each in unet.named_parameters()}
    network, *base = ([each for each in group["params"] if each.requires_grad] for group in optimizer.param_groups)
    return {
        "network": [each.numel() for each in network],
        "base": {names[id(each)]: each.numel() for group in base for each in group},
    }


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns defaults of their script, the rate that it gives the network, and what a network is by default."""
    args, _, optimizer = optimized(checkout)
    network = script(checkout).ControlNeXtModel()
    first, last = network.embedding[0], network.down_res[-1]
    return {
        "scale": args.controlnext_scale,
        "control_rate": round(optimizer.param_groups[0]["lr"] / args.learning_rate, 6),
        "channels": first.in_channels,
        "widths": [first.out_channels, last.in_channels, last.out_channels],
    }
