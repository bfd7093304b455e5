"""What SCEdit's own code computes in a small UNet, with its gradients, what it starts from and trains, and the options
in its configurations: ``python -m peftcore.testing.freeze scedit.py CHECKOUT``.

Its UNet runs layers that are given to it: those of `Host`, which here stand in both.
"""

import copy
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import yaml
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn

SOURCE = Source("authors", "modelscope/scepter", "9f5b439", "scepter/modules/model/tuner/sce/scetuning.py")
VERSIONS = ("torch",)
TUNER, UNET = "model.tuner.sce.scetuning", "model.backbone.unet.unet_module"
STYLE, IMAGE = "t2i/sd15_512_sce_t2i.yaml", "ctr/sd15_512_sce_ctr_hed.yaml"
WIDTHS, HINTS, CHANNELS, SCALE = (3, 4), [1, 2, 6, 5], 2, 0.7
CASES = {"plain": None, "image": 3, "point": 1}
"""The kernel of the convolutions behind each other, or none without an image."""
INSIDE, WIDE = 40_000, [1, 2, 6, 15_000]
"""How wide a tuner and the network of an image are of which the start is told."""
CHANNELS_OF_UNET, CONTEXT = (32, 64), 14
"""Widths of the UNet of which is told what trains, whose stages have one resnet each, and of its text."""


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers that everybody can make again."""
    numbers = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(numbers**1.5 + phase).view(shape)


def latents() -> Tensor:
    return wave(2, 2, 4, 4)


def image() -> Tensor:
    return wave(2, CHANNELS, 32, 32, phase=1.0)


@torch.no_grad()
def filled(module: nn.Module, start: float) -> None:
    """Fill all tensors with waves of 0.3."""
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(0.3 * wave(*parameter.shape, phase=start + number))


class Resnet(nn.Module):
    """Two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(torch.tanh(self.conv1(x)))
        return y


class Block(nn.Module):
    """A stage of an encoder, a decoder or neither."""

    def __init__(self, *sizes: tuple[int, int], down: int = 0, up: int = 0) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(*each) for each in sizes)
        if down:
            self.downsamplers = nn.ModuleList([nn.Conv2d(down, down, 3, stride=2, padding=1)])
        if up:
            self.upsamplers = nn.ModuleList([nn.ConvTranspose2d(up, up, 2, stride=2)])


class Host(nn.Module):
    """A UNet as diffusers names its parts: two stages, four skips."""

    def __init__(self) -> None:
        super().__init__()
        one, two = WIDTHS
        self.conv_in = nn.Conv2d(2, one, 3, padding=1)
        self.down_blocks = nn.ModuleList([Block((one, one), down=one), Block((one, two))])
        self.mid_block = Block((two, two))
        self.up_blocks = nn.ModuleList([Block((two + two, two), (two + one, two), up=two)])
        self.up_blocks.append(Block((two + one, one), (one + one, one)))
        self.out = nn.Conv2d(one, 2, 1)
        filled(self.double(), 0.0)

    def encoder(self) -> list[list[nn.Module]]:
        """What leaves a skip each."""
        first, second = self.down_blocks
        return [[self.conv_in], [first.resnets[0]], [first.downsamplers[0]], [second.resnets[0]]]

    def decoder(self) -> list[list[nn.Module]]:
        """What reads a skip each."""
        first, second = self.up_blocks
        tail = [first.resnets[1], first.upsamplers[0]]
        return [[first.resnets[0]], tail, [second.resnets[0]], [second.resnets[1]]]

    def forward(self, sample: Tensor) -> Tensor:
        skips = []
        for stage in self.encoder():
            skips.append(sample := run(stage, sample))
        sample = self.mid_block.resnets[0](sample)
        for stage in self.decoder():
            sample = run(stage, torch.cat([sample, skips.pop()], 1))
        output: Tensor = self.out(sample)
        return output


def run(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class Stage(nn.Module):
    """Layers as their UNet calls them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return run(self.layers, x)


def loaded(checkout: Path, name: str) -> Any:
    """Returns a module of theirs."""
    sys.path.insert(0, str(checkout))
    return importlib.import_module(f"scepter.modules.{name}")


def config(told: dict[str, Any]) -> Any:
    return importlib.import_module("scepter.modules.utils.config").Config(load=False, cfg_dict=copy.deepcopy(told))


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns output and gradients by case."""
    unet, made, found = loaded(checkout, UNET).DiffusionUNet, loaded(checkout, TUNER), {}
    for case, kernel in CASES.items():
        host = Host()
        stages = {
            "input_blocks": [Stage(layers) for layers in host.encoder()],
            "output_blocks": [Stage(layers) for layers in host.decoder()],
            "middle_block": Stage([host.mid_block.resnets[0]]),
            "out": host.out,
        }
        chans, halved = [WIDTHS[0], WIDTHS[0], WIDTHS[0], WIDTHS[1]], [False, False, True, False]
        sizes = {"INPUT_BLOCK_CHANS": chans, "INPUT_DOWN_FLAG": halved, "PRE_HINT_IN_CHANNELS": CHANNELS}
        sizes |= {
            "PRE_HINT_OUT_CHANNELS": HINTS[-1],
            "PRE_HINT_DIM_RATIO": HINTS[0] / 16,
            "DENSE_HINT_KERNAL": kernel or 3,
            "SCALE": SCALE,
        }
        tuner = made.CSCTuners(config({**sizes, "SC_TUNER_CFG": {"NAME": "SCTuner"}})).double()
        x = latents().requires_grad_()
        if kernel is None:
            lone = tuner.lsc_tuner_blocks
            filled(lone, 13.0)
            whole = SimpleNamespace(**stages, lsc_identity=lone)
            output, named = unet._forward_origin(whole, x, None, None, tuner_scale=SCALE), lone.named_parameters()
        else:
            filled(tuner, 13.0)
            none = [nn.Identity()] * 4
            whole = SimpleNamespace(**stages, control_blocks=[tuner], lsc_identity=none)
            output, named = unet._forward_control(whole, x, None, None, image()), tuner.named_parameters()
        (output * wave(*output.shape, phase=2.0)).sum().backward()
        gradients = {name: parameter.grad.flatten().tolist() for name, parameter in named}
        found[case] = {"output": output.flatten().tolist(), "x": x.grad.flatten().tolist(), **gradients}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the two matrices of a tuner are drawn from, and in the network of an image the last convolution of
    the first seven, and the one behind."""
    made, width = loaded(checkout, TUNER), WIDTHS[1]
    tuner = made.SCTuner(config({"DIM": width, "TUNER_LENGTH": INSIDE})).tuner_op
    sizes = {"INPUT_BLOCK_CHANS": [width], "INPUT_DOWN_FLAG": [False], "PRE_HINT_IN_CHANNELS": CHANNELS}
    sizes |= {"PRE_HINT_OUT_CHANNELS": WIDE[-1], "PRE_HINT_DIM_RATIO": WIDE[0] / 16}
    image = made.CSCTuners(config({**sizes, "SC_TUNER_CFG": {"NAME": "SCTuner"}}))
    layers = {"down": tuner.ln1, "up": tuner.ln2, "first": image.pre_hint_blocks[-1]}
    layers["cascade"] = image.dense_hint_blocks[0][1]
    return {
        f"{name}.{kind}": drawn(layer.get_parameter(kind))
        for name, layer in layers.items()
        for kind in ("weight", "bias")
    }


def method(checkout: Path, file: str) -> Any:
    """Returns one of their configurations."""
    return yaml.safe_load((checkout / "scepter/methods/scedit" / file).read_text(encoding="utf-8"))["SOLVER"]


def trains(checkout: Path) -> dict[str, list[int]]:
    """Returns the sizes of all that trains in their order, by their configurations for a style and for an image."""
    sized = {"IN_CHANNELS": 2, "OUT_CHANNELS": 2, "MODEL_CHANNELS": CHANNELS_OF_UNET[0], "NUM_RES_BLOCKS": 1}
    sized |= {"ATTENTION_RESOLUTIONS": [1], "CHANNEL_MULT": [1, 2], "NUM_HEADS": 2, "CONTEXT_DIM": CONTEXT}
    made = loaded(checkout, "model.network.ldm.ldm_sce")
    made.LatentDiffusion.construct_network, made.ANNOTATORS = lambda model: None, MagicMock()
    solver, found = loaded(checkout, "solver.diffusion_solver").LatentDiffusionSolver, {}
    for case, file in {"plain": STYLE, "image": IMAGE}.items():
        told = method(checkout, file)
        model = object.__new__(getattr(made, told["MODEL"]["NAME"]))
        nn.Module.__init__(model)
        model.model = loaded(checkout, UNET).DiffusionUNet(config(sized), None)
        model.first_stage_model = model.cond_stage_model = nn.Linear(1, 1)
        model.logger, model.control_anno_config = MagicMock(), None
        model.tuner_model_config = model.control_model_config = config(
            told["MODEL"]["TUNER_MODEL" if case == "plain" else "CONTROL_MODEL"]
        )
        model.construct_network()
        solver.freeze(SimpleNamespace(logger=MagicMock()), told["FREEZE"], model)
        found[case] = [each.numel() for each in model.parameters() if each.requires_grad]
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns options of their configurations for a style and for an image, and the widths of the network that is made
    by the latter."""
    style = method(checkout, STYLE)["MODEL"]["TUNER_MODEL"]
    image = method(checkout, IMAGE)["MODEL"]["CONTROL_MODEL"]
    sizes = {"INPUT_BLOCK_CHANS": [4], "INPUT_DOWN_FLAG": [False]}
    first, *rest = loaded(checkout, TUNER).CSCTuners(config({**image, **sizes})).pre_hint_blocks
    widths = [first.out_channels, *(each.out_channels for each in rest[1::2] if each.stride == (2, 2))]
    return {
        "ratio": style["SC_TUNER_CFG"]["DOWN_RATIO"], "channels": style.get("PRE_HINT_IN_CHANNELS"),
        "scale": image["SCALE"], "kernel": image["DENSE_HINT_KERNAL"], "widths": widths,
    }  # fmt: skip
