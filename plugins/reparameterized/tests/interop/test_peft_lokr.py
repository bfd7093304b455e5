"""LoKr in folders of peft, both ways."""

import copy
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
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(24, 30), (2, 3, 24)),
    "conv1d": (lambda: nn.Conv1d(24, 20, 3, stride=2, padding=1), (2, 24, 9)),
    "conv2d": (lambda: nn.Conv2d(24, 20, (3, 2), dilation=2), (2, 24, 7, 6)),
    "grouped": (lambda: nn.Conv2d(48, 20, 3, groups=2), (2, 48, 5, 4)),
    "pointwise": (lambda: nn.Conv2d(24, 30, 1), (2, 24, 3, 3)),
}
THEIRS = {"tucker": "use_effective_conv2d", "decompose_both": "decompose_both", "factor": "decompose_factor"}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 2},
    "tucker": {"rank": 2, "tucker": True},
    "both": {"rank": 1, "decompose_both": True},
    "cut": {"rank": 1, "factor": 2},
    "larger": {"rank": 1, "factor": 10},
    "full": {"rank": 11},
}
ALPHA = 6


def larger(model: nn.Module) -> None:
    """Products of small numbers would hardly move the output."""
    for name, parameter in model.named_parameters():
        if "lokr" in name:
            parameter.data.mul_(5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_both_ways(name: str, form: str, tmp_path: Path) -> None:
    (build, shape), options = LAYERS[name], FORMS[form]
    base, x = One(build()), torch.randn(shape)
    theirs = {THEIRS[key]: value for key, value in options.items() if key in THEIRS}
    config = peft.LoKrConfig(target_modules=["layer"], r=options["rank"], alpha=ALPHA, init_weights=False, **theirs)
    assert_reads(base, config, lambda model: model(x), tmp_path, larger)
    ours = {"target": "layer", "alpha": 90.0, "factor_first": form == "larger", **options}
    if (name, form) == ("conv1d", "full"):  # the values of the product have another order
        injection = peftcore.apply(copy.deepcopy(base), "lokr", **ours)
        with pytest.raises(ExportError, match="unless layout is 'peft'"):
            injection.save(tmp_path / "refused", format="peft")
        ours["layout"] = "peft"
    assert_writes(base, "lokr", ours, lambda model: model(x), tmp_path)


def test_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 16)), torch.randn(4, 36)
    patterns: dict[str, Any] = {"rank_pattern": {"2": 1}, "alpha_pattern": {"^0": 7}}
    config = peft.LoKrConfig(target_modules=["0", "2"], r=2, alpha=5, init_weights=False, **patterns)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path, larger)
    found = [(injection.config.at(path).rank, injection.config.at(path).alpha) for path in ("0", "2")]
    assert found == [(2, 7), (1, 5)]
    options = {"target": ["0", "2"], "rank": 2, "alpha": 90.0, "overrides": {"2": {"rank": 1, "alpha": 40.0}}}
    assert_writes(base, "lokr", options, lambda model: model(x), tmp_path)


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    wanted: dict[str, dict[str, Any]] = {
        "peft has no full_matrix": {"full_matrix": True},
        "factor=10 unless factor_first is set": {"factor": 10, "rank": 1},
    }
    for reason, options in wanted.items():
        injection = peftcore.apply(One(nn.Linear(24, 30)), "lokr", target="layer", **options)
        with pytest.raises(ExportError, match=reason):
            injection.save(tmp_path / "refused", format="peft")
