"""Super-Tuning in folders of peft, both ways: shira with a sparsity."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from safetensors.torch import load_file, save_file
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


def larger(model: nn.Module) -> None:
    """Few entries of a weight hardly move the output."""
    for name, parameter in model.named_parameters():
        if "supertuning" in name:
            parameter.data.mul_(4)


@pytest.mark.parametrize("select_top", [True, False])
@pytest.mark.parametrize("rank", [None, 3])
def test_both_ways(rank: int | None, select_top: bool, tmp_path: Path) -> None:
    base, x = One(nn.Linear(12, 7)), torch.randn(3, 12)
    theirs: dict[str, Any] = {"sparsity": 0.7, "select_top": select_top, **({"r": rank} if rank else {})}
    config = peft.SupertuningConfig(target_modules=["layer"], **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, larger)
    mask = "magnitude" if select_top else "smallest"
    ours = {"mask": mask, "sparsity": 0.7, "low_rank": rank or 0, "alpha": 2.0 * rank if rank else 16.0}
    assert {name: getattr(injection.config, name) for name in ours} == ours
    assert injection.operators["layer"].index.shape == (25,) and (injection.operators["layer"].index.diff() > 0).all()
    written = assert_writes(base, "shira", {"target": "layer", **ours}, lambda model: model(x), tmp_path)
    assert theirs | {"peft_type": "SUPERTUNING"} == {name: written[name] for name in [*theirs, "peft_type"]}


def test_a_model(tmp_path: Path) -> None:
    base, inputs = HOSTS["llama"].build()
    config = peft.SupertuningConfig(target_modules=["q_proj", "v_proj"], sparsity=0.9, r=2)
    assert_reads(base, config, lambda model: model(**inputs).logits, tmp_path, larger)
    options = {"sparsity": 0.9, "low_rank": 2, "target": ["q_proj", "v_proj"]}
    assert_writes(base, "supertuning", options, lambda model: model(**inputs).logits, tmp_path)


@pytest.mark.filterwarnings("ignore:save_precomputed_indices")
@pytest.mark.parametrize("select_top", [True, False])
def test_entries_that_no_file_has_are_those_of_the_model(select_top: bool, tmp_path: Path) -> None:
    base, x = One(nn.Linear(12, 7)), torch.randn(3, 12)
    config = peft.SupertuningConfig(
        target_modules=["layer"], sparsity=0.7, select_top=select_top, save_precomputed_indices=False
    )
    assert_reads(base, config, lambda model: model(x), tmp_path, larger)
    assert not [name for name in load_file(tmp_path / "theirs" / "adapter_model.safetensors") if "indices" in name]


def test_dropout_is_told(tmp_path: Path) -> None:
    base = One(nn.Linear(12, 7))
    config = peft.SupertuningConfig(target_modules=["layer"], sparsity=0.7, r=2, lora_dropout=0.1)
    saved_by_peft(base, config, tmp_path)
    with pytest.warns(UserWarning, match="inputs of the low-rank part had dropout 0.1"):
        peftcore.load(base, tmp_path)


def test_refusals(tmp_path: Path) -> None:
    for options in ({"mask": "random", "sparsity": 0.5}, {"rank": 1, "low_rank": 2}):
        injection = peftcore.apply(One(nn.Linear(12, 7)), "shira", target="layer", **options)
        with pytest.raises(ExportError, match="no method that computes what shira does with these options"):
            injection.save(tmp_path / "refused", format="peft")
    mixed = {"0": {"sparsity": None, "rank": 1}}
    for base, other, words in (({"sparsity": 0.5}, mixed, "SUPERTUNING selects the largest"),
                               ({"rank": 1}, {"0": {"sparsity": 0.5}}, "SHIRA has neither")):  # fmt: skip
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        injection = peftcore.apply(model, "shira", target=["0", "1"], mask="magnitude", overrides=other, **base)
        with pytest.raises(ExportError, match=words):
            injection.save(tmp_path / "refused", format="peft")
    base = One(nn.Linear(12, 7))
    saved_by_peft(base, peft.SupertuningConfig(target_modules=["layer"], sparsity=0.7), tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    good, name = load_file(file), "base_model.model.layer.supertuning_indices"
    for entry in (84, -1, int(good[name][1])):
        indices = good[name].clone()
        indices[0] = entry
        save_file({**good, name: indices}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match="not distinct entries of 84"):
            peftcore.load(base, tmp_path / "theirs")
    save_file(good, file, {"format": "pt"})
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sparsity": 0.6}))
    with pytest.raises(CheckpointError, match="shape"):
        peftcore.load(base, tmp_path / "theirs")
