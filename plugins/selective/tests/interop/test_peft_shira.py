"""SHiRA in folders of peft, both ways."""

from pathlib import Path

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


def larger(model: nn.Module) -> None:
    """Few entries of a weight hardly move the output."""
    for name, parameter in model.named_parameters():
        if "shira" in name:
            parameter.data.mul_(4)


def test_llama(tmp_path: Path) -> None:
    base, inputs = HOSTS["llama"].build()
    config = peft.ShiraConfig(r=2, target_modules=["q_proj", "v_proj"])
    injection = assert_reads(base, config, lambda model: model(**inputs).logits, tmp_path, larger)
    index = injection.operators["model.layers.0.self_attn.q_proj"].index
    assert (index.diff() > 0).all() and index.shape == (2 * (16 + 16),)
    assert_writes(base, "shira", {"rank": 2}, lambda model: model(**inputs).logits, tmp_path)


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_masks_of_peft_and_of_ours(mask: str, tmp_path: Path) -> None:
    """Whatever chose the entries, the file says which they are."""
    base, x = One(nn.Linear(12, 7)), torch.randn(3, 12)

    def first_entries(layer: nn.Linear, r: int, **options: object) -> Tensor:
        chosen = torch.zeros(7 * 12)
        chosen[: r * 19] = 1
        return chosen.view(7, 12)

    config = peft.ShiraConfig(r=2, target_modules=["layer"], random_seed=3)
    if mask == "magnitude":
        config = peft.ShiraConfig(r=2, target_modules=["layer"], mask_type="first")
        config.mask_fn = first_entries
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, larger)
    assert mask == "random" or injection.operators["layer"].index.tolist() == list(range(38))
    assert_writes(base, "shira", {"target": "layer", "rank": 2, "mask": mask}, lambda model: model(x), tmp_path)


def test_entries_in_any_order(tmp_path: Path) -> None:
    base, x = One(nn.Linear(12, 7)), torch.randn(3, 12)
    theirs = saved_by_peft(base, peft.ShiraConfig(r=2, target_modules=["layer"]), tmp_path)
    file, order = tmp_path / "adapter_model.safetensors", torch.randperm(38)
    save_file({name: value[..., order].contiguous() for name, value in load_file(file).items()}, file)
    peftcore.load(base, tmp_path)
    torch.testing.assert_close(base(x), theirs(x))


def test_refusals(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Embedding(9, 8)), "shira", target="layer", rank=2)
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        injection.save(tmp_path / "table", format="peft")
    base = One(nn.Linear(12, 7))
    saved_by_peft(base, peft.ShiraConfig(r=2, target_modules=["layer"]), tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    good, name = load_file(file), "base_model.model.layer.shira_indices"
    for row, entry in ((0, 7), (1, 12), (1, -1), (0, None)):
        indices = good[name].clone()
        if entry is None:
            indices[:, 0] = indices[:, 1]
        else:
            indices[row, 0] = entry
        save_file({**good, name: indices}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"not distinct entries of \(7, 12\)"):
            peftcore.load(base, tmp_path / "theirs")
    save_file({key: value for key, value in good.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing shira_indices"):
        peftcore.load(base, tmp_path / "theirs")
