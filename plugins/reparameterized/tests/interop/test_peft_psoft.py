"""PSOFT in folders of peft, both ways."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_same, assert_writes, saved_by_peft
from torch import nn

import peftcore
from peftcore.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TARGET = ["0", "2"]
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "free": ({"psoft_orth": False}, {"orthogonal": False}),
    "one vector": ({"psoft_mag_b": False}, {"scale_outputs": False}),
    "both sides": ({"ab_svd_init": "pissa_init"}, {"singular_values": "both"}),
    "series": (
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 6, "cayley_neumann_eps": 0.4},
        {"series": 6, "eps": 0.4},
    ),
}


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 6))


@pytest.mark.parametrize("form", FORMS)
def test_both_ways(form: str, tmp_path: Path) -> None:
    (theirs, ours), x = FORMS[form], torch.randn(2, 3, 12)
    base = host()
    config = peft.PsoftConfig(target_modules=TARGET, r=5, psoft_alpha=9, psoft_dropout=0.1, **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    default = peftcore.method("psoft").Config().model_dump(exclude={"method", "overrides"})
    assert found == {**default, "rank": 5, "dropout": 0.1, **ours}
    options = {"target": TARGET, "rank": 5, "dropout": 0.2, **ours}
    written = assert_writes(base, "psoft", options, lambda model: model(x), tmp_path)
    assert theirs | {"psoft_dropout": 0.2} == {name: written[name] for name in [*theirs, "psoft_dropout"]}


def test_vectors_that_are_found_by_an_approximation(tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    options = {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1, "random_seed": 3}
    config = peft.PsoftConfig(target_modules=TARGET, r=3, **options)
    assert_reads(base, config, lambda model: model(x), tmp_path)


def test_what_was_found_by_peft_s_default_approximation_is_written_so(tmp_path: Path) -> None:
    base, x = host(), torch.randn(2, 3, 12)
    config = peft.PsoftConfig(target_modules=TARGET, r=3, psoft_svd="lowrank")
    saved_by_peft(base, config, tmp_path / "theirs")
    ours = copy.deepcopy(base)
    peftcore.load(ours, tmp_path / "theirs").save(tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert_same(base(x), ours(x), again(x))
    assert again.peft_config["default"].psoft_svd == "lowrank"


def test_refusals(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3)), "psoft", target="layer", rank=2)
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        injection.save(tmp_path / "conv", format="peft")
    injection = peftcore.apply(One(nn.Linear(3, 4)), "psoft", target="layer", rank=4)
    with pytest.raises(ExportError, match="rank=4 above that of the weight"):
        injection.save(tmp_path / "rank", format="peft")
    layer = nn.Linear(12, 9)
    injection = peftcore.apply(One(layer), "psoft", target="layer", rank=4)
    nn.init.normal_(layer.weight)
    with pytest.raises(ExportError, match="other singular vectors"):
        injection.save(tmp_path / "other", format="peft")
