"""(IA)^3 in files of LyCORIS, both ways, with the real LyCORIS on a small UNet. Its own loader of files fails with any
of them, so that its network loads ours."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lycoris_files import of_inputs, read_into_their_network, theirs, unet
from pipeline_models import assert_same, out
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.kohya import TENSORS

PLAIN = [".*to_[qkv]"]
"""Modules without a bias."""
BIASED = [".*conv[12]", ".*proj_in", ".*net.0.proj"]


@pytest.mark.parametrize(
    ("names", "on_input", "methods"),
    [
        (PLAIN, False, ["ia3"]),
        (PLAIN + BIASED, True, ["ia3"]),
        (BIASED, False, ["glora"]),
        (PLAIN + BIASED, False, ["glora", "ia3"]),
    ],
    ids=["outputs", "inputs", "beside biases", "both"],
)
def test_both_ways(names: list[str], on_input: bool, methods: list[str], tmp_path: Path) -> None:
    if "glora" in methods:
        pytest.importorskip("peftcore_hybrid")
    model, inputs = unet()
    base, file = deepcopy(model), tmp_path / "their.safetensors"
    options = {"names": names, "network_module": "ia3", "train_on_input": on_input}
    expected = theirs(model, file, 0.3, **options)
    injection = peftcore.load(model, file)
    assert sorted({part.method.name for part in injection.parts.values()} or {injection.method.name}) == methods
    for ours, its, before in zip(*(of_inputs(each, inputs) for each in (model, expected, base)), strict=True):
        assert_same(ours, its, before)
    injection.save(tmp_path / "back", format="kohya/lycoris")
    before, after = load_file(file), load_file(tmp_path / "back" / TENSORS)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
    again = read_into_their_network(base, tmp_path / "back", **options)
    assert_same(out(model, inputs), out(again, inputs), out(unet()[0], inputs))


@pytest.mark.parametrize(
    ("layer", "scale_inputs", "message"),
    [
        (nn.Linear(4, 6), [], "the bias of 0; exclude it, or train glora"),
        (nn.Conv2d(4, 6, 3, groups=2), ["*"], "the inputs of a grouped convolution such as 0"),
    ],
)
def test_not_written(layer: nn.Module, scale_inputs: list[str], message: str, tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(layer), "ia3", target="0", scale_inputs=scale_inputs)
    with pytest.raises(ExportError, match=message):
        injection.save(tmp_path / "adapter", format="kohya")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(5), "on_input": torch.tensor(0)}, r"weight has shape \(5,\), expected \(6,\)"),
        ({"weight": torch.ones(6), "on_input": torch.tensor([0, 1])}, r"on_input has shape \(2,\)"),
        ({"on_input": torch.tensor(1)}, "missing weight"),
        ({"weight": torch.ones(6)}, "no installed plugin reads weight at"),
    ],
)
def test_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file({f"lycoris_0.{name}": value for name, value in tensors.items()}, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(nn.Sequential(nn.Linear(4, 6, bias=False)), tmp_path)
