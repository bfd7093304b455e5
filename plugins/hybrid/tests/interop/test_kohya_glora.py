"""GLoRA in files of LyCORIS, both ways, with the real LyCORIS on a small UNet; a vector A alone is its (IA)^3."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris_files import of_inputs, read_by_them, read_into_their_network, theirs, unet
from pipeline_models import assert_same, out
from safetensors.torch import load_file, save_file
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.kohya import TENSORS

TARGET = ["to_q", "to_k", "to_v", "conv1", "conv2", "proj_in", "net.0.proj"]
PLAIN = {"C": "none", "D": "none", "E": "none"}


def test_what_they_wrote(tmp_path: Path) -> None:
    model, inputs = unet()
    base, file = deepcopy(model), tmp_path / "their.safetensors"
    sizes = {"lora_dim": 2, "conv_lora_dim": 3, "alpha": 3.0, "conv_alpha": 5.0}
    expected = theirs(model, file, 0.2, network_module="glora", **sizes)
    injection = peftcore.load(model, file)
    assert injection.method.name == "glora"
    for ours, its, before in zip(*(of_inputs(each, inputs) for each in (model, expected, base)), strict=True):
        assert_same(ours, its, before)
    injection.save(tmp_path / "back", format="kohya/lycoris")
    before, after = load_file(file), load_file(tmp_path / "back" / TENSORS)
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    assert_same(out(read_by_them(base, tmp_path / "back"), inputs), out(model, inputs), out(base, inputs))


@pytest.mark.parametrize("options", [{}, {"A": "none"}, {"B": "none"}], ids=["both", "B alone", "A alone"])
def test_what_they_read(options: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = unet()
    base = deepcopy(model)
    injection = peftcore.apply(model, "glora", target=TARGET, rank=2, **{"A": "product", **PLAIN, **options})
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.2)
    injection.save(tmp_path, format="kohya/lycoris")
    expected = read_by_them(base, tmp_path)
    for ours, its, before in zip(*(of_inputs(each, inputs) for each in (model, expected, unet()[0])), strict=True):
        assert_same(ours, its, before)
    again = deepcopy(base)
    peftcore.load(again, tmp_path)
    assert_same(out(again, inputs), out(model, inputs), out(unet()[0], inputs))


def test_a_vector_alone_is_their_ia3(tmp_path: Path) -> None:
    model, inputs = unet()
    base = deepcopy(model)
    injection = peftcore.apply(model, "glora", target=TARGET, A="vector", B="none", **PLAIN)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.3)
    injection.save(tmp_path, format="kohya/lycoris")
    expected = read_into_their_network(base, tmp_path, network_module="ia3")
    assert_same(out(model, inputs), out(expected, inputs), out(unet()[0], inputs))


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Linear(4, 6), {}, "0 has other options"),
        (nn.Linear(4, 6), {"A": "product", "B": "vector", **PLAIN}, "0 has other options"),
        (nn.Conv2d(4, 6, 3, groups=2), {"A": "product", **PLAIN}, "grouped convolution such as 0"),
    ],
)
def test_not_written(layer: nn.Module, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(layer), "glora", target="0", **options)
    with pytest.raises(ExportError, match=message):
        injection.save(tmp_path / "adapter", format="kohya")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a1.weight": None}, "no installed plugin reads|missing a1"),
        ({"b2.weight": None}, "missing b2.weight"),
        ({"b1.weight": torch.ones(6, 3)}, r"b1.weight has shape \(6, 3\), expected \(6, 2\)"),
        ({"alpha": torch.tensor(0.0)}, "alpha is 0.0"),
        ({"bm.weight": torch.ones(2, 2)}, "no installed plugin reads"),
    ],
)
def test_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    peftcore.apply(deepcopy(model), "glora", target="0", rank=2, A="product", **PLAIN).save(tmp_path, format="kohya")
    tensors = load_file(tmp_path / TENSORS) | {f"lycoris_0.{name}": value for name, value in change.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(model, tmp_path)


def test_peft_has_no_product(tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(4, 6)), "glora", target="0", A="product")
    with pytest.raises(ExportError, match="config_A_B"):
        injection.save(tmp_path / "adapter", format="peft")
