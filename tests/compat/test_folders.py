"""Adapters are in peft's format where it can hold them, otherwise in ours; the Trainer finds both."""

from pathlib import Path

import pytest
import torch
from training_hosts import host

import peftcore

peft = pytest.importorskip("peft")
folders = pytest.importorskip("peftcore.compat.folders")


def test_a_method_of_peft_is_written_as_peft_writes_it(tmp_path: Path) -> None:
    injection = peftcore.apply(host("llama"), "lora", rank=3)
    folders.save_folder(injection, tmp_path)
    assert folders.config_in(tmp_path).r == 3
    assert not (tmp_path / "adapter.safetensors").exists()


def test_another_one_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    folders.save_folder(peftcore.apply(host("llama"), "lora"), tmp_path)
    injection = peftcore.apply(host("llama"), "houlsby_adapter")
    folders.save_folder(injection, tmp_path)
    assert folders.config_in(tmp_path) is None
    again = peftcore.load(host("llama"), tmp_path)
    assert again.method.name == "houlsby_adapter"
    for key, value in again.state_dict().items():
        assert torch.equal(value, injection.state_dict()[key])
    one_file = peftcore.load(host("llama"), tmp_path / folders.WEIGHTS)
    assert one_file.state_dict().keys() == again.state_dict().keys()
