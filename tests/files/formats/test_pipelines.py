"""Single files: which one of a folder is meant, what format it is, and which of its parts is for a host."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, HostMismatch
from peftcore.files.formats import diffusers, kohya
from peftcore.files.formats.format import recognize

ROWS = torch.arange(6.0).view(2, 3)


def host() -> nn.Module:
    """Two modules, one with an underscore in its name."""
    torch.manual_seed(1)
    return nn.ModuleDict({"a_b": nn.Linear(3, 4), "c": nn.ModuleDict({"d": nn.Conv2d(3, 4, 3)})})


def theirs(prefix: str = "unet.", path: str = "a_b") -> dict[str, Tensor]:
    return {f"{prefix}{path}.lora_A.weight": ROWS.clone(), f"{prefix}{path}.lora_B.weight": torch.ones(4, 2)}


def kohyas(prefix: str = "lora_unet_", path: str = "a_b") -> dict[str, Tensor]:
    return {f"{prefix}{path}.lora_down.weight": ROWS.clone(), f"{prefix}{path}.lora_up.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(("tensors", "name"), [(theirs(), "diffusers"), (theirs(""), "diffusers"), (kohyas(), "kohya")])
def test_a_file_or_the_only_one_of_a_folder(tensors: dict[str, Tensor], name: str, tmp_path: Path) -> None:
    file = tmp_path / "some style.safetensors"
    save_file(tensors, file)
    for place in (file, tmp_path):
        assert recognize(place).name == name
        injection = peftcore.load(host(), place)
        assert torch.equal(injection.operators["a_b"].A, ROWS)
    save_file(tensors, tmp_path / "another.safetensors")
    with pytest.raises(CheckpointError, match=r"another\.safetensors, some style\.safetensors"):
        peftcore.load(host(), tmp_path)
    usual = {"diffusers": diffusers.TENSORS, "kohya": kohya.TENSORS}[name]
    save_file({key: 2 * value for key, value in tensors.items()}, tmp_path / usual)
    assert torch.equal(peftcore.load(host(), tmp_path).operators["a_b"].A, 2 * ROWS)


@pytest.mark.parametrize("name", [diffusers.TENSORS, kohya.TENSORS])
def test_the_other_ones_usual_name_says_nothing(name: str, tmp_path: Path) -> None:
    for tensors, format in ((theirs(), "diffusers"), (kohyas(), "kohya")):
        save_file(tensors, tmp_path / name)
        assert recognize(tmp_path).name == format


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / diffusers.TENSORS).write_bytes(b"\x80\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        peftcore.load(host(), tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    save_file({"weight": ROWS}, other / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"not an adapter in a known format .*kohya.*x\.safetensors"):
        peftcore.load(host(), other)


@pytest.mark.parametrize("make", [theirs, kohyas])
def test_parts(make: Any, tmp_path: Path) -> None:
    """Those of other models are passed over, if their names are known; hosts that hold the part are found too."""
    known = {theirs: ("unet.", "text_encoder."), kohyas: ("lora_unet_", "lora_te1_")}[make]
    file = tmp_path / "x.safetensors"
    save_file(make(known[0]) | make(known[1], "x"), file)
    assert list(peftcore.load(host(), file).operators) == ["a_b"]
    assert list(peftcore.load(nn.ModuleDict({"inside": host()}), file).operators) == ["inside.a_b"]
    with pytest.raises(
        HostMismatch, match=rf"'{known[1][:-1]}' of .* this model has no x;.*'{known[0][:-1]}' of .* has no a.b"
    ):
        peftcore.load(nn.ModuleDict({"other": nn.Linear(3, 4)}), file)
    save_file(make(known[0]) | make("strange_", "y"), file)
    with pytest.raises(CheckpointError, match=r"unknown strange_y"):
        peftcore.load(host(), file)
    assert list(peftcore.load(host(), file, strict=False).operators) == ["a_b"]
    save_file(make(known[0]) | make(known[1]), file)
    with pytest.raises(HostMismatch, match="all fit this host"):
        peftcore.load(host(), file)


@pytest.mark.parametrize("make", [theirs, kohyas])
def test_places_that_lack_a_tensor(make: Any, tmp_path: Path) -> None:
    """Refused; where it is accepted the place stays as it is when fresh."""
    tensors = make()
    name = next(name for name in tensors if name.endswith(("lora_B.weight", "lora_up.weight")))
    del tensors[name]
    save_file(tensors, tmp_path / "x.safetensors")
    model = host()
    base = deepcopy(model)
    with pytest.raises(CheckpointError, match="missing lora_"):
        peftcore.load(model, tmp_path)
    injection = peftcore.load(model, tmp_path, strict=False)
    assert injection.operators["a_b"].A.any()
    injection.bake()
    assert torch.equal(model["a_b"].weight, base["a_b"].weight)


def test_half_precision(tmp_path: Path) -> None:
    """As most files have it; operators are as precise as always."""
    save_file({name: value.half() for name, value in kohyas().items()}, tmp_path / "x.safetensors")
    injection = peftcore.load(host(), tmp_path)
    assert injection.operators["a_b"].A.dtype == torch.float32
    assert torch.equal(injection.operators["a_b"].A, ROWS)


@pytest.mark.parametrize("make", [theirs, kohyas])
def test_sizes_beyond_all_memory(make: Any, tmp_path: Path) -> None:
    """Shapes without values do not make us reserve memory."""
    tensors = make()
    first = next(iter(tensors))
    save_file(tensors | {first: torch.empty(2**40, 0)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="has shape"):
        peftcore.load(host(), tmp_path)
