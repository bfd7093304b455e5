"""Dropouts in folders of peft, both ways: read as options of ours, written back, and never left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes
from torch import Tensor, nn

import peftcore
from peftcore.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
LORA = {"target_modules": ["layer"], "r": 3, "lora_dropout": 0.2}
LYCORIS = {"target_modules": ["layer"], "r": 3, "rank_dropout": 0.2, "module_dropout": 0.1}
OURS = {"rank_dropout": 0.2, "module_dropout": 0.1}
CASES: dict[str, tuple[peft.PeftConfig, dict[str, Any], dict[str, Any]]] = {
    "lora": (peft.LoraConfig(**LORA), {"dropout": 0.2}, {"lora_dropout": 0.2}),
    "dora": (peft.LoraConfig(use_dora=True, **LORA), {"dropout": 0.2}, {"lora_dropout": 0.2}),
    "pissa": (peft.LoraConfig(init_lora_weights="pissa", **LORA), {"dropout": 0.2}, {"lora_dropout": 0.2}),
    "olora": (peft.LoraConfig(init_lora_weights="olora", **LORA), {"dropout": 0.2}, {"lora_dropout": 0.2}),
    "hira": (
        peft.HiraConfig(target_modules=["layer"], r=3, hira_dropout=0.2), {"dropout": 0.2}, {"hira_dropout": 0.2},
    ),
    "randlora": (
        peft.RandLoraConfig(target_modules=["layer"], r=3, randlora_dropout=0.2),
        {"dropout": 0.2}, {"randlora_dropout": 0.2},
    ),
    "frod": (
        peft.FrodConfig(target_modules=["layer"], frod_dropout=0.2, progressbar=False),
        {"dropout": 0.2}, {"frod_dropout": 0.2},
    ),
    "loha": (peft.LoHaConfig(init_weights=False, **LYCORIS), {**OURS, "rank_dropout_scale": True}, OURS),
    "lokr": (
        peft.LoKrConfig(init_weights=False, rank_dropout_scale=True, **LYCORIS),
        {**OURS, "rank_dropout_scale": True}, {**OURS, "rank_dropout_scale": True},
    ),
    "boft": (
        peft.BOFTConfig(target_modules=["layer"], boft_block_size=4, boft_dropout=0.2),
        {"block_dropout": 0.2}, {"boft_dropout": 0.2},
    ),
    "oft": (
        peft.OFTConfig(target_modules=["layer"], r=0, oft_block_size=4, module_dropout=0.2),
        {"block_dropout": 0.2}, {"module_dropout": 0.2},
    ),
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "boft": {"block_size": 4, "factors": 1},
    "oft": {"block_size": 4},
    "frod": {"sparsity": 0.1},
}


def run(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x)


@torch.no_grad()
def larger(model: nn.Module) -> None:
    """Products of four small numbers would hardly move the output."""
    for name, parameter in model.named_parameters():
        if "hada" in name or "lokr" in name:
            parameter.mul_(4)


@pytest.mark.filterwarnings("ignore:.*had no effect in peft:UserWarning")
@pytest.mark.parametrize("method", CASES)
def test_both_ways(method: str, tmp_path: Path) -> None:
    config, ours, theirs = CASES[method]
    base, x = One(nn.Linear(12, 8)), torch.randn(2, 3, 12)
    injection = assert_reads(base, config, run(x), tmp_path, larger)
    assert injection.method.name == method
    assert {name: getattr(injection.config, name) for name in ours} == ours
    options = {"target": "layer", **SIZES.get(method, {"rank": 3}), **ours}
    if method in ("loha", "lokr"):
        options["alpha"] = 90.0
    written = assert_writes(One(nn.Linear(12, 8)), method, options, run(x), tmp_path)
    assert {name: written[name] for name in theirs} == theirs
    injection.save(tmp_path / "again", format="peft")
    again = peftcore.load(One(nn.Linear(12, 8)), tmp_path / "again")
    assert {name: getattr(again.config, name) for name in ours if hasattr(again.config, name)} == ours


@pytest.mark.parametrize("method", ["lora", "dora", "hira"])
def test_tables_beside_layers(method: str, tmp_path: Path) -> None:
    """Peft drops nothing of tokens, whatever the option says; ours has none there."""

    def host() -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))

    config = {
        "lora": peft.LoraConfig(target_modules=["0", "1"], r=2, lora_dropout=0.2),
        "dora": peft.LoraConfig(target_modules=["0", "1"], r=2, lora_dropout=0.2, use_dora=True),
        "hira": peft.HiraConfig(target_modules=["0", "1"], r=2, hira_dropout=0.2),
    }[method]
    ids = torch.tensor([[0, 3, 5], [8, 1, 1]])
    injection = assert_reads(host(), config, run(ids), tmp_path)
    assert [injection.config.at(path).dropout for path in ("0", "1")] == [0.0, 0.2]
    injection.save(tmp_path / "again", format="peft")
    again = peftcore.load(host(), tmp_path / "again")
    assert [again.config.at(path).dropout for path in ("0", "1")] == [0.0, 0.2]
    options = {"target": ["0", "1"], "rank": 2, "dropout": 0.3, "overrides": {"0": {"dropout": 0.0}}}
    written = assert_writes(host(), method, options, run(ids), tmp_path)
    assert written["hira_dropout" if method == "hira" else "lora_dropout"] == 0.3


def test_of_oft_peft_says_what_it_does_not_do(tmp_path: Path) -> None:
    base = One(nn.Linear(12, 8))
    peft.get_peft_model(base, CASES["oft"][0]).save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match=r"module_dropout = 0\.2 had no effect in peft"):
        peftcore.load(One(nn.Linear(12, 8)), tmp_path)


def test_what_peft_does_not_have_is_refused(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Linear(12, 8)), "loha", target="layer", rank=2, rank_dropout=0.2)
    with pytest.raises(ExportError, match="rank_dropout_scale=True"):
        injection.save(tmp_path / "loha", format="peft")
    options = {"target": ["0", "1"], "rank": 2, "overrides": {"0": {"dropout": 0.1}}}
    injection = peftcore.apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "hira", **options)
    with pytest.raises(ExportError, match="peft has one hira_dropout for all modules"):
        injection.save(tmp_path / "hira", format="peft")
