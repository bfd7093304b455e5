"""Polytropon in folders of peft, there POLY, both ways, with a task for each row."""

from pathlib import Path

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TASKS, SKILLS, RANK = 4, 3, 3
TOLD = [3, 1]


def larger(model: nn.Module) -> None:
    """Products of two small numbers hardly move the output, and small logits hardly tell tasks apart."""
    for name, parameter in model.named_parameters():
        if "poly_" in name:
            parameter.data.mul_(5)


@pytest.mark.parametrize("splits", [1, 4])
def test_both_ways(splits: int, tmp_path: Path) -> None:
    base, inputs = HOSTS["llama"].build()

    def run(model: nn.Module) -> Tensor:
        if isinstance(model, peft.PeftModel):
            return model(**inputs, task_ids=torch.tensor(TOLD)).logits
        if not peftcore.injections(model):
            return model(**inputs).logits
        with peftcore.call(model, task=TOLD):
            return model(**inputs).logits

    config = peft.PolyConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        n_tasks=TASKS,
        n_skills=SKILLS,
        n_splits=splits,
        target_modules=["q_proj", "v_proj"],
    )
    injection = assert_reads(base, config, run, tmp_path, larger)
    assert (injection.config.tasks, injection.config.skills, injection.config.splits) == (TASKS, SKILLS, splits)
    options = {"tasks": TASKS, "skills": SKILLS, "rank": RANK, "splits": splits, "target": ["attn.q", "attn.out"]}
    written = assert_writes(base, "polytropon", options, run, tmp_path)
    assert (written["target_modules"], written["task_type"]) == (["o_proj", "q_proj"], "CAUSAL_LM")


def test_refusals(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3)), "polytropon", target="layer", tasks=2)
    with pytest.raises(ExportError, match="not a layer that peft adapts this way: Linear"):
        injection.save(tmp_path / "conv", format="peft")
    base = One(nn.Linear(12, 8))
    saved_by_peft(base, peft.PolyConfig(target_modules=["layer"]), tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(file.read_text().replace('"poly_type": "poly"', '"poly_type": "other"'))
    with pytest.raises(CheckpointError, match="'poly_type' is 'other'"):
        peftcore.load(base, tmp_path / "theirs")
