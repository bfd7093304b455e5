"""AdaMSS in folders of peft, both ways; what it means that they lack the clusters."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_folders import assert_reads, assert_writes, saved_by_peft
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TARGET = ["first", "second"]


class Two(nn.Module):
    """With a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"r": 6}, {"components": 6}),
    "few": ({"r": 6, "num_subspaces": 3, "subspace_rank": 2}, {"components": 6, "subspaces": 3, "rank": 2}),
    "another seed": ({"r": 6, "random_seed": 3}, {"components": 6, "projection_seed": 3}),
    "ranks by values": (
        {"r": 6, "subspace_rank": 3, "use_dynamic_rank": True, "svd_threshold": 0.3},
        {"components": 6, "rank": 3, "threshold": 0.3},
    ),
    "dropping": (
        {"r": 6, "use_asa": True, "asa_target_subspaces": 3, "init_warmup": 5, "final_warmup": 9, "mask_interval": 2,
         "asa_importance_beta": 0.7, "asa_uncertainty_beta": 0.8, "asa_schedule_exponent": 2.0},
        {"components": 6, "target_subspaces": 3, "warmup": 5, "until": 9, "interval": 2, "beta1": 0.7, "beta2": 0.8,
         "exponent": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_both_ways(form: str, tmp_path: Path) -> None:
    (theirs, ours), base, x = FORMS[form], Two(), torch.randn(2, 3, 12)
    config = peft.AdamssConfig(target_modules=TARGET, **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    default = peftcore.method("adamss").Config().model_dump(exclude={"method", "overrides"})
    assert found == {**default, **ours}
    options = {"target": TARGET, **ours}
    written = assert_writes(base, "adamss", options, lambda model: model(x), tmp_path)
    assert theirs == {name: written[name] for name in theirs}


def test_clusters_that_another_base_has_are_not_guessed(tmp_path: Path) -> None:
    """peft opens the file on any weights of the shapes, and puts what was trained at other outputs; here it is refused.
    Our own file has the clusters."""
    base, x = Two().eval(), torch.randn(2, 3, 12)
    saved_by_peft(base, peft.AdamssConfig(target_modules=["first"], r=6, num_subspaces=2), tmp_path / "theirs")
    other = deepcopy(base)
    with torch.no_grad():
        other.first.weight.copy_(other.first.weight.flip(0))
    with pytest.raises(CheckpointError, match="the clusters of outputs, which the file does not hold, may differ"):
        peftcore.load(deepcopy(other), tmp_path / "theirs")
    model = deepcopy(base)
    injection = peftcore.load(model, tmp_path / "theirs")
    change = model(x) - base(x)
    injection.save(tmp_path / "ours")
    again = deepcopy(base)
    with torch.no_grad():
        again.first.weight.add_(0.05 * torch.randn_like(again.first.weight))
    before = again(x)
    operator = peftcore.load(again, tmp_path / "ours").operators["first"]
    assert torch.equal(operator.cluster, injection.operators["first"].cluster)
    assert difference(again(x) - before, change) < 0.5


def test_clusters_that_rounding_decides_are_not_guessed(tmp_path: Path) -> None:
    """With as many components as outputs, all rows of U have one distance from each other."""
    base = Two()
    saved_by_peft(base, peft.AdamssConfig(target_modules=["second"], num_subspaces=3), tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="rounding decides"):
        peftcore.load(deepcopy(base), tmp_path / "theirs")
    injection = peftcore.apply(base, "adamss", target=["second"], subspaces=3)
    with pytest.raises(ExportError, match="rounding decides"):
        injection.save(tmp_path / "ours", format="peft")


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(nn.Conv2d(4, 6, 3)), "adamss", target="0")
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        injection.save(tmp_path / "conv", format="peft")
    model = Two()
    injection = peftcore.apply(model, "adamss", target=["first"])
    with torch.no_grad():
        model.first.weight.copy_(model.first.weight.flip(0))
    with pytest.raises(ExportError, match="differ from the adapter's"):
        injection.save(tmp_path / "weights", format="peft")


def test_a_factor_of_another_size(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved_by_peft(Two(), peft.AdamssConfig(target_modules=["first"], r=6, num_subspaces=2), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.first.adamss_B.0"
    for wrong in (torch.zeros(3, 1), torch.zeros(())):
        save_file({**tensors, name: wrong}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"adamss_B\.0 has shape"):
            peftcore.load(Two(), tmp_path)
