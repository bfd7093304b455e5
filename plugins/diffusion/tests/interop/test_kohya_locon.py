"""LoCon with cores in files of LyCORIS, both ways, with the real LyCORIS."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lycoris_files import read_by_them, theirs
from pipeline_models import assert_same, out
from safetensors.torch import load_file, save_file
from torch import nn

import peftcore
from peftcore.errors import CheckpointError
from peftcore.files.formats.kohya import TENSORS
from peftcore.testing.hosts import HOSTS

SIZES = {"lora_dim": 2, "conv_lora_dim": 3, "alpha": 3.0, "conv_alpha": 5.0, "use_tucker": True}


def test_what_they_wrote(tmp_path: Path) -> None:
    model, inputs = HOSTS["unet"].build()
    base = deepcopy(model.eval())
    expected = theirs(model, tmp_path / "their.safetensors", 0.2, network_module="locon", **SIZES)
    injection = peftcore.load(model, tmp_path / "their.safetensors")
    assert injection.method.name == "locon"
    assert injection.config.use_tucker
    assert_same(out(model, inputs), out(expected, inputs), out(base, inputs))
    injection.save(tmp_path / "ours")
    again = deepcopy(base)
    assert peftcore.load(again, tmp_path / "ours").config == injection.config
    assert torch.equal(out(again, inputs), out(model, inputs))


@pytest.mark.parametrize("options", [{"use_tucker": True}, {}, {"scaling": "sqrt_rank"}], ids=["tucker", "flat", "rs"])
def test_what_they_read(options: dict[str, object], tmp_path: Path) -> None:
    model, inputs = HOSTS["unet"].build()
    base = deepcopy(model.eval())
    sizes = {"rank": 2, "alpha": 3.0, "conv_rank": 3, "conv_alpha": 5.0}
    injection = peftcore.apply(model, "locon", **sizes, **options)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.1)
    injection.save(tmp_path, format="kohya/lycoris")
    expected = read_by_them(base, tmp_path)
    assert_same(out(model, inputs), out(expected, inputs), out(base, inputs))
    again = deepcopy(base)
    peftcore.load(again, tmp_path)
    assert_same(out(again, inputs), out(model, inputs), out(base, inputs))


def test_a_core_of_the_wrong_shape(tmp_path: Path) -> None:
    model, _ = HOSTS["unet"].build()
    theirs(model, tmp_path / TENSORS, 0.2, network_module="locon", **SIZES)
    tensors = load_file(tmp_path / TENSORS)
    name = next(name for name in tensors if "lora_mid" in name)
    save_file(tensors | {name: torch.ones(3, 3, 1, 1)}, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=r"lora_mid\.weight has shape \(3, 3, 1, 1\), expected \(3, 3, 3, 3\)"):
        peftcore.load(model, tmp_path)
