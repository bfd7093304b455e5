"""What SCEdit's own code computes in a small UNet, with its gradients:
``python -m peftcore.testing.freeze scedit.py CHECKOUT``.

Its UNet runs layers that are given to it: those of `Host`, which here stand in both. The repository's other modules, of
which these import names alone, stand empty.
"""

import importlib
import sys
from pathlib import Path
from runpy import run_path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "modelscope/scepter", "9f5b439", "scepter/modules/model/tuner/sce/scetuning.py")
VERSIONS = ("torch",)
UNET = "scepter/modules/model/backbone/unet/unet_module.py"
WIDTHS, HINTS, CHANNELS, SCALE = (3, 4), [1, 2, 6, 5], 2, 0.7
CASES = {"plain": None, "image": 3, "point": 1}
"""The kernel of the convolutions behind each other, or none without an image."""


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


class Anything(ModuleType):
    """A module that has every name."""

    REGISTRY = SimpleNamespace(register_class=lambda *_: lambda each: each)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return {"conv_nd": conv, "zero_module": zeroed, "TUNERS": tuners(), "BACKBONES": self.REGISTRY}.get(name, Base)


class Base(nn.Module):
    """What all of their networks are made of."""

    def __init__(self, cfg: Any = None, logger: Any = None) -> None:
        super().__init__()


def conv(dims: int, *sizes: Any, **more: Any) -> nn.Module:
    return nn.Conv2d(*sizes, **more)


def zeroed(module: nn.Module) -> nn.Module:
    return module


def tuners() -> SimpleNamespace:
    """Their registry, which here knows the tuner alone."""
    return SimpleNamespace(
        register_class=lambda *_: lambda each: each, build=lambda cfg, logger: MADE["SCTuner"](cfg, logger)
    )


MADE: dict[str, Any] = {}


def loaded(checkout: Path) -> Any:
    """Return their UNet's class, and fill `MADE` with that of their tuners."""
    names = "tuner tuner.tuner_utils tuner.tuner_component tuner.base_tuner registry base_model utils utils.basic_utils"
    models = [f"scepter.modules.model.{name}" for name in f"{names} backbone.unet.unet_utils".split()]
    tools = [f"scepter.modules.utils.{name}" for name in ("config", "file_system", "distribute")]
    sys.modules |= {name: Anything(name) for name in (*models, *tools)}
    package = ModuleType("sce")
    package.__path__ = [str((checkout / SOURCE.script).parent)]
    sys.modules["sce"] = package
    MADE.update(vars(importlib.import_module("sce.scetuning")))
    return run_path(str(checkout / UNET))["DiffusionUNet"]


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns output and gradients by case."""
    unet, found = loaded(checkout), {}
    for case, kernel in CASES.items():
        host = Host()
        stages = {
            "input_blocks": [Stage(layers) for layers in host.encoder()],
            "output_blocks": [Stage(layers) for layers in host.decoder()],
            "middle_block": Stage([host.mid_block.resnets[0]]),
            "out": host.out,
        }
        chans, halved = [WIDTHS[0], WIDTHS[0], WIDTHS[0], WIDTHS[1]], [False, False, True, False]
        config = {"INPUT_BLOCK_CHANS": chans, "INPUT_DOWN_FLAG": halved, "PRE_HINT_IN_CHANNELS": CHANNELS}
        config |= {
            "PRE_HINT_OUT_CHANNELS": HINTS[-1],
            "PRE_HINT_DIM_RATIO": HINTS[0] / 16,
            "DENSE_HINT_KERNAL": kernel or 3,
            "SCALE": SCALE,
        }
        tuner = MADE["CSCTuners"]({**config, "SC_TUNER_CFG": {"NAME": "SCTuner"}}).double()
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
