"""Control-LoRA in Stability's file format, which ComfyUI and diffusers read (checked against diffusers 0.42).

Modules have the names of Stable Diffusion's original code. ``.down`` and ``.up`` are the low-rank factors. An empty
tensor ``lora_controlnet`` marks the format. The files store whole biases, while peftcore stores their differences from
the UNet's biases, so reading and writing a file need the biases of the UNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from peftcore import Injection
from peftcore.author import BorrowedLayer, Surgeon
from peftcore.author.formats import (
    FORMAT,
    Content,
    Description,
    Envelope,
    Files,
    Format,
    Found,
    SavedSite,
    TensorFile,
    Tensors,
    layer_of,
    ldm_names,
    names_in,
    only_file,
)
from peftcore.errors import CheckpointError, ExportError, HostMismatch

TENSORS, SIGN = "control_lora.safetensors", "lora_controlnet"
HINT = "input_hint_block."


class ControlLoRA(Format):
    """The file format of Stability's Control-LoRA."""

    name = "control_lora"
    file = TENSORS

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return SIGN in names_in(only_file(path, TENSORS))

    def open(self, path: Path, model: nn.Module) -> Content:
        file = TensorFile(only_file(path, TENSORS) or path / TENSORS)
        blocks = _blocks(model)
        if not blocks:
            raise HostMismatch(
                f"{file.path} is for a UNet of diffusers, but this is {type(model).__name__}: load it on the UNet"
            )
        envelope = Envelope(
            format=FORMAT,
            method="controlnet_lora",
            config_version=1,
            config=_options(file),
            selections={"": tuple(SavedSite(module_path=each) for each in blocks)},
        )
        return ControlLoRAContent(envelope, file, model)

    def describe(self, path: Path) -> Description:
        file = TensorFile(only_file(path, TENSORS) or path / TENSORS)
        return Description(self.name, (file,), methods=("controlnet_lora",), options=_options(file))

    def files(self, injection: Injection, weights: bool = False) -> Files:
        model, config = injection.model, injection.config
        if injection.method.name != "controlnet_lora" or injection.trained_along:
            raise ExportError(
                f"{injection.name!r} is not a single controlnet_lora, and files of {self.name} hold only that; save it "
                "in peftcore's format"
            )
        if config.scale != 1.0 or config.guess_mode:
            raise ExportError(
                f"files of {self.name} store neither scale nor guess mode: reset both to save, and set them where the "
                "file is used"
            )
        blocks = {site.module_path for site in injection.selections[""]}
        if blocks != {*_blocks(model)}:
            raise ExportError(
                f"files of {self.name} control all blocks of a UNet, so the model itself must be that UNet"
            )
        (network,) = injection.shared.values()
        tensors = {SIGN: torch.zeros(0)}
        for path, theirs, tensor, shapes in named(network, model, ExportError):
            whole = tensor.detach().to("cpu") + _bias(network, model, path, ExportError)
            tensors[theirs] = whole.to(tensor.dtype).reshape(shapes[-1])
        return {TENSORS: Tensors(tensors, {"format": "pt"})}


class ControlLoRAContent(Content):
    """The content of one Control-LoRA file in Stability's format."""

    def __init__(self, envelope: Envelope, file: TensorFile, model: nn.Module) -> None:
        super().__init__(envelope, file.path)
        self.file, self.model = file, model

    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        ((name, shared),) = surgeon.owned.items()
        shapes, kinds = self.file.shapes, self.file.dtypes
        if strange := sorted(each for each, kind in kinds.items() if not kind.is_floating_point):
            raise CheckpointError(f"{self.where}: {', '.join(strange[:8])} have no floating-point numbers")
        values = {each: value.float() for each, value in self.file.read().items()}
        found = Found({each: each for each in shapes}, shapes, values.__getitem__, [], {SIGN})
        ours = {}
        for path, theirs, _, wanted in named(shared.module, self.model, CheckpointError):
            if strict or found.has(theirs):
                value = found.take(theirs, *wanted)
                ours[f"shared:{name}.{path}"] = value - _bias(shared.module, self.model, path, CheckpointError)
        wrong = found.wrong + [f"unknown {each}" for each in sorted(shapes.keys() - found.used) if strict]
        if wrong:
            raise CheckpointError(f"{self.where}: {'; '.join(wrong)}")
        return ours


def _blocks(model: nn.Module) -> list[str]:
    """Return the paths of the blocks that Control-LoRA controls in a UNet; an empty list if the model is not a UNet."""
    paths = {path for path, _ in model.named_modules()}
    if not ldm_names(paths) or "mid_block" not in paths:
        return []
    return ["mid_block", *(f"up_blocks.{name}" for name, _ in model.get_submodule("up_blocks").named_children())]


def _options(file: TensorFile) -> dict[str, Any]:
    """Return the options of the method, derived from the shapes in a file."""
    hints = [file.shapes.get(f"{HINT}{number}.weight", Size()) for number in range(0, 64, 2)]
    hints = [shape for shape in hints if len(shape) == 4]
    ranks = [shape[0] for name, shape in file.shapes.items() if name.endswith(".down") and shape]
    if len(hints) < 2 or len(hints) % 2 or not ranks:
        raise CheckpointError(f"{file.path} has no updates, or no network for the image, as files of Control-LoRA have")
    return {
        "method": "controlnet_lora",
        "rank": max(ranks),
        "vectors": "input_blocks.0.0.bias" in file.shapes,
        "channels": hints[0][1],
        "widths": [shape[0] for shape in (hints[0], *hints[2:-1:2])],
    }


def named(
    network: nn.Module, model: nn.Module, error: type[CheckpointError] | type[ExportError]
) -> Iterator[tuple[str, str, Tensor, list[tuple[int, ...]]]]:
    """Yield four values for each tensor of a network: its path in the network, its name in files, the tensor itself,
    and the shapes that it may have in files. Files are written with the last shape.

    Raises:
        CheckpointError, ExportError: the format lacks a name for a layer of the network; the argument `error` chooses
            the type.
    """
    original = {ours: theirs for theirs, ours in ldm_names([path for path, _ in model.named_modules()]).items()}
    original |= _around(network)
    for path, tensor in network.named_parameters():
        above, _, name = path.rpartition(".")
        if above not in original:
            raise error(f"files of control_lora have no name for {above} of this UNet")
        layer, shapes = network.get_submodule(above), [tuple(tensor.shape)]
        if name == "up" and isinstance(layer, BorrowedLayer) and layer.down is not None and layer.down.dim() > 2:
            shapes.append((*tensor.shape, *[1] * (layer.down.dim() - 2)))
        yield path, f"{original[above]}.{name}", tensor, shapes


def _bias(network: nn.Module, model: nn.Module, path: str, error: type[CheckpointError] | type[ExportError]) -> Tensor:
    """Return the difference between a tensor in files and in the network: the UNet's bias if the network stores only
    the change of that bias, otherwise 0."""
    above, _, name = path.rpartition(".")
    if name != "bias" or not isinstance(network.get_submodule(above), BorrowedLayer):
        return torch.zeros(())
    lent = model.get_submodule(above)
    held = layer_of(lent, name).read(lent, name)
    if held is None or held.is_meta:
        raise error(
            f"the file stores whole biases, but {above} of this UNet has no values now (offloaded or on meta): load "
            "them first"
        )
    return held.detach().to("cpu", torch.float32)


def _around(network: Any) -> Mapping[str, str]:
    """Return the names in files of the layers outside of the encoder, by their paths in the network."""
    hint, names = "controlnet_cond_embedding", {"controlnet_mid_block": "middle_block_out.0"}
    layers = ["conv_in", *(f"blocks.{number}" for number in range(len(network.controlnet_cond_embedding.blocks)))]
    for number, layer in enumerate([*layers, "conv_out"]):
        names[f"{hint}.{layer}"] = f"{HINT}{2 * number}"
    for number in range(len(network.controlnet_down_blocks)):
        names[f"controlnet_down_blocks.{number}"] = f"zero_convs.{number}.0"
    return names
