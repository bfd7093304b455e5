"""Folders of mlx-lm: what its layers make of them is what the adapter does."""

import json
from pathlib import Path

import pytest
import torch
from exported_hosts import llama, logits, noisy
from safetensors.torch import load_file
from torch import Tensor

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.mlx import MLX
from peftcore.files.readers.check import check
from peftcore.files.readers.reader import reader_named


@torch.no_grad()
def as_mlx(folder: Path) -> Tensor:
    """Its arithmetic, as of mlx_lm/tuner/lora.py: y + scale * ((x @ lora_a) @ lora_b), at the modules in the last
    blocks, and elsewhere, that `keys` names."""
    model = llama()
    config = json.loads((folder / "adapter_config.json").read_text())
    said, tensors = config["lora_parameters"], load_file(folder / "adapters.safetensors")
    first = len(model.model.layers) - config["num_layers"]
    blocks = [f"model.layers.{index}." for index in range(first, len(model.model.layers))]
    wrapped = {f"{front}{key}" for key in said["keys"] for front in ["", *blocks]}
    for name, a in tensors.items():
        path, _, leaf = name.rpartition(".")
        assert path in wrapped and a.shape[0 if leaf == "lora_b" else 1] == said["rank"]
        if leaf == "lora_a":
            model.get_submodule(path).weight += said["scale"] * (a @ tensors[f"{path}.lora_b"]).T
    return logits(model)


@pytest.mark.parametrize("target", [None, ["model.layers.1.mlp.up_proj", "q_proj"], ["lm_head"]])
def test_what_it_computes(target: list[str] | None, tmp_path: Path) -> None:
    model = llama()
    wishes = {} if target is None else {"target": target}
    injection = noisy(model, "rslora", rank=3, overrides={"*.layers.1.*": {"rank": 2, "alpha": 5.0}}, **wishes)
    injection.save(tmp_path / "a", format="mlx")
    assert torch.allclose(as_mlx(tmp_path / "a"), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(llama()), logits(model), rtol=1e-3)
    assert check(tmp_path / "a", reader_named("mlx-lm")).as_trained


def test_it_is_described_and_not_loaded(tmp_path: Path) -> None:
    noisy(llama(), "lora").save(tmp_path / "a", format="mlx")
    assert MLX.recognizes(tmp_path / "a") and not MLX.recognizes(tmp_path)
    about = MLX().describe(tmp_path / "a")
    assert about.format == "mlx" and about.kind == "lora" and "does not load them" in about.problem
    with pytest.raises(CheckpointError, match="does not load them"):
        peftcore.load(llama(), tmp_path / "a")


def test_other_methods_and_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="mlx-lm reads only low-rank factors"):
        noisy(llama(), "dora").save(tmp_path / "a", format="mlx")
    blocks = [torch.nn.Sequential(torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2)})) for _ in range(2)]
    towers = torch.nn.ModuleList(torch.nn.ModuleDict({"layers": each}) for each in blocks)
    injection = peftcore.apply(towers, "lora", target=["0.layers.0.up"], rank=1)
    with pytest.raises(ExportError, match="in the list called layers"):
        injection.save(tmp_path / "b", format="mlx")
