"""T-LoRA in files of LyCORIS, both ways, with the real LyCORIS on a small UNet, where no timestep is said."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris_files import of_inputs, read_by_them, theirs, unet
from pipeline_models import assert_same, out
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError, NoWeights
from peftcore.files.formats.kohya import TENSORS

NAMES, TARGET = [".*to_[qkv]", ".*proj_in", ".*net.0.proj"], ["to_q", "to_k", "to_v", "proj_in", "net.0.proj"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is of T-LoRA")


@pytest.mark.parametrize("alpha", [4.0, 3.0])
def test_what_they_wrote(alpha: float, tmp_path: Path) -> None:
    model, inputs = unet()
    base, file = deepcopy(model), tmp_path / "their.safetensors"
    sizes = {"lora_dim": 4, "conv_lora_dim": 4, "alpha": alpha, "conv_alpha": alpha}
    expected = theirs(model, file, 0.3, names=NAMES, network_module="tlora", **sizes)
    with pytest.warns(UserWarning, match="of T-LoRA, which can drop ranks by the timestep"):
        injection = peftcore.load(model, file)
    assert injection.method.name == "pissa"
    for ours, its, before in zip(*(of_inputs(each, inputs) for each in (model, expected, base)), strict=True):
        assert_same(ours, its, before)
    injection.save(tmp_path / "back", format="kohya/lycoris")
    assert_same(out(read_by_them(base, tmp_path / "back"), inputs), out(model, inputs), out(unet()[0], inputs))
    before, after = load_file(file), load_file(tmp_path / "back" / TENSORS)
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}


def test_what_they_read(tmp_path: Path) -> None:
    model, inputs = unet()
    base = deepcopy(model)
    injection = peftcore.apply(model, "pissa", target=TARGET, rank=4, alpha=4.0)
    for parameter in injection.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    injection.save(tmp_path, format="kohya/lycoris")
    expected = read_by_them(base, tmp_path)
    for ours, its, before in zip(*(of_inputs(each, inputs) for each in (model, expected, unet()[0])), strict=True):
        assert_same(ours, its, before)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Linear(8, 6), {"rank": 2, "alpha": 4.0}, "set alpha to the rank"),
        (nn.Conv2d(4, 6, 3), {"rank": 2, "alpha": 2.0}, "no T-LoRA for the kernels of 0"),
    ],
)
def test_not_written(layer: nn.Module, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(layer), "pissa", target="0", **options)
    with pytest.raises(ExportError, match=message):
        injection.save(tmp_path / "adapter", format="kohya")


def written(path: Path, change: dict[str, Tensor | None]) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    peftcore.apply(model, "pissa", target="0", rank=2, alpha=2.0).save(path, format="kohya")
    tensors = load_file(path / TENSORS) | {f"lycoris_0.{name}": value for name, value in change.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path / TENSORS)


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        (nn.Linear(8, 6), {"p_layer.weight": None}, "missing p_layer.weight"),
        (nn.Linear(8, 6), {"q_layer.weight": torch.ones(2, 7)}, r"q_layer.weight has shape \(2, 7\)"),
        (nn.Linear(8, 6), {"lambda_layer": torch.ones(1, 7)}, "T-LoRA of rank 7 does not fit a weight"),
        (nn.Conv2d(8, 6, 3), {}, "T-LoRA of rank 2 does not fit a weight"),
    ],
)
def test_refused(layer: nn.Module, change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    written(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(nn.Sequential(layer), tmp_path)


def test_without_weights(tmp_path: Path) -> None:
    written(tmp_path, {})
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(NoWeights):
        peftcore.load(model, tmp_path)
