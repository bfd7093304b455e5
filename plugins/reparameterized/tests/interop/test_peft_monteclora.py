"""MonteCLoRA in folders of peft, both ways."""

from pathlib import Path

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes
from safetensors.torch import load_file
from torch import nn

import peftcore
from peftcore.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


def test_both_ways(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6)), torch.randn(2, 3, 12)
    sampler = {
        "num_samples": 3,
        "use_entropy": True,
        "dirichlet_prior": 0.2,
        "sample_scaler": 0.01,
        "kl_loss_weight": 1e-4,
    }
    theirs = {"r": 4, "lora_alpha": 90, "lora_dropout": 0.1, "use_rslora": True}
    told = peft.tuners.lora.MontecloraConfig(**sampler, buffer_size=2)
    config = peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False, monteclora_config=told, **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    ours = {"rank": 4, "alpha": 90.0, "scaling": "sqrt_rank", "dropout": 0.1}
    ours |= {"samples": 3, "entropy": True, "prior": 0.2, "sample_scale": 0.01, "kl": 1e-4}
    assert injection.config.model_dump(exclude={"method", "overrides"}) == ours
    assert all(operator.t.std() > 0 for operator in injection.operators.values())
    injection.save(tmp_path / "again", format="peft")
    first, again = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "again"))
    priors = [name for name in first if name.endswith(("std_prior", "expert_weights_prior"))]
    assert len(priors) == 4 and all(torch.equal(first[name], again[name]) for name in priors)
    written = assert_writes(base, "monteclora", {"target": ["0", "2"], **ours}, lambda model: model(x), tmp_path)
    assert written["monteclora_config"] == {**sampler, "buffer_size": 150}
    opened = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    held = opened.base_model.model[0].lora_monteclora_sampler["default"]
    mine = peftcore.load(nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6)), tmp_path / "ours", strict=False)
    assert torch.equal(mine.operators["0"].t, held.std_prior)
    assert torch.equal(mine.operators["0"].p, held.expert_weights_prior)


def test_refusals(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3)), "monteclora", target="layer", rank=4)
    with pytest.raises(ExportError, match="a sampler, which it has only in linear layers"):
        injection.save(tmp_path / "refused", format="peft")
