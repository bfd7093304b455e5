"""What is read of a file of kohya: who reads a module, the dropouts of its header, and names that mean the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peftcore.errors import CheckpointError, HostMismatch
from peftcore.files.formats.kohya_reading import ARGUMENTS, KohyaContent
from peftcore.files.safe_io import TensorFile

RANK, WIDTH = 2, 4


def host() -> nn.ModuleDict:
    return nn.ModuleDict({"one": nn.Linear(WIDTH, WIDTH), "two": nn.Linear(WIDTH, WIDTH), "act": nn.ReLU()})


def factors(module: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"lora_down.weight": torch.randn(RANK, WIDTH), "lora_up.weight": torch.randn(WIDTH, RANK), **more}
    return {f"lora_unet_{module}.{name}": value for name, value in found.items()}


def read(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> KohyaContent:
    save_file(tensors, path / "file.safetensors", metadata)
    return KohyaContent(TensorFile(path / "file.safetensors"), host())


def test_each_module_is_read_by_the_method_of_its_tensors(tmp_path: Path) -> None:
    change = {"lora_unet_two.diff": torch.randn(WIDTH, WIDTH)}
    content = read(tmp_path, factors("one", alpha=torch.tensor(1.0)) | change)
    shares = {share.method.methods[0]: [group.path for group in share.groups] for share in content.shares}
    assert shares == {"lora": ["one"], "attention_only": ["two"]}  # the first of those whose values are replaced


def test_what_no_plugin_reads_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no installed plugin reads strange at lora_unet_one"):
        read(tmp_path, {"lora_unet_one.strange": torch.zeros(2, 3)})


def test_a_module_without_a_weight_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostMismatch):
        read(tmp_path, factors("act"))


def test_two_names_of_one_module_are_refused(tmp_path: Path) -> None:
    other = {name.replace("lora_unet_one", "diffusion_model.one"): value for name, value in factors("one").items()}
    with pytest.raises(CheckpointError):
        read(tmp_path, factors("one") | other)


@pytest.mark.parametrize("said", [{"dropout": "0.0", "rank_dropout": "None"}, {"dropout": "3"}, {"dim": "4"}])
def test_dropouts_that_are_off_are_none(said: dict[str, str], tmp_path: Path) -> None:
    assert "dropout" not in read(tmp_path, factors("one"), **{ARGUMENTS: json.dumps(said)}).envelope.config


def test_dropouts_of_another_form_get_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"trained with dropout = 0.25, which lora does not support in this form"):
        read(tmp_path, factors("one"), **{ARGUMENTS: json.dumps({"dropout": "0.25"})})


def test_dropouts_of_our_form_are_options(tmp_path: Path) -> None:
    names = ("hada_w1_a", "hada_w2_a"), ("hada_w1_b", "hada_w2_b")
    tensors = {f"lora_unet_one.{name}": torch.randn(WIDTH, RANK) for name in names[0]}
    tensors |= {f"lora_unet_one.{name}": torch.randn(RANK, WIDTH) for name in names[1]}
    content = read(tmp_path, tensors, **{ARGUMENTS: json.dumps({"rank_dropout": "0.25"})})
    assert content.envelope.config["rank_dropout"] == 0.25
