"""DEFT in folders of peft, both ways."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes
from torch import nn

import peftcore
from peftcore.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TARGET = ["0", "2"]
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "projection": ({"decomposition_method": "qr"}, {"projection": "qr"}),
    "scaled": ({"alpha": 9}, {"alpha": 9.0}),
    "para": ({"para": True}, {"injects": False}),
    "another start": ({"init_weights": False, "init_scale": 5.0}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_both_ways(form: str, tmp_path: Path) -> None:
    (theirs, ours), x = FORMS[form], torch.randn(2, 3, 12)
    base = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 6))
    config = peft.DeftConfig(target_modules=TARGET, r=4, deft_dropout=0.1, bias="deft_only", **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    default = peftcore.method("deft").Config().model_dump(exclude={"method", "overrides"})
    assert found == {**default, "rank": 4, "dropout": 0.1, **ours}
    options = {"target": TARGET, "rank": 4, "dropout": 0.2, "train": ["0.bias", "2.bias"], **ours}
    written = assert_writes(base, "deft", options, lambda model: model(x), tmp_path)
    expected = {"deft_dropout": 0.2, "bias": "deft_only"} | ({} if form == "another start" else theirs)
    assert expected == {name: written[name] for name in expected}


def test_fewer_outputs_than_the_rank(tmp_path: Path) -> None:
    base, x = One(nn.Linear(12, 3)), torch.randn(5, 12)
    config = peft.DeftConfig(target_modules=["layer"], r=8, alpha=6)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert injection.operators["layer"].P.shape == (3, 3)
    assert_writes(base, "deft", {"target": "layer", "rank": 8, "alpha": 6.0}, lambda model: model(x), tmp_path)


def test_refusals(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3)), "deft", target="layer", rank=2)
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        injection.save(tmp_path / "conv", format="peft")
    injection = peftcore.apply(One(nn.Linear(4, 6)), "deft", target="layer", rank=2, alpha=2.5)
    with pytest.raises(ExportError, match=r"integer alpha, not 2\.5"):
        injection.save(tmp_path / "alpha", format="peft")
