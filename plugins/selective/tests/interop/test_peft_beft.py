"""BEFT in folders of peft, both ways, and beside peft's: it is bitfit at linear layers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_folders import assert_reads, assert_writes, saved_by_peft
from peft_pairs import ADAPTER, Both, Pair
from safetensors.torch import load_file, save_file
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.testing import against
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


@pytest.mark.parametrize(("name", "target"), [("llama", "v_proj"), ("bert", "value")])
def test_both_ways(name: str, target: str, tmp_path: Path) -> None:
    """Where the model has no biases (Llama), and where it has (BERT)."""
    base, inputs = HOSTS[name].build()
    with torch.no_grad():
        for path, each in base.named_parameters():
            if path.endswith("bias"):
                each.normal_(0, 0.1)
    config = peft.BeftConfig(target_modules=[target])
    injection = assert_reads(base, config, lambda model: HOSTS[name].output(model(**inputs)), tmp_path)
    assert injection.method.name == "bitfit" and {site.tensor for site in injection.sites} == {"bias"}
    options = {"target": [target], "add_missing_bias": True}
    written = assert_writes(base, "bitfit", options, lambda model: HOSTS[name].output(model(**inputs)), tmp_path)
    assert written["peft_type"] == "BEFT" and written["target_modules"] == [target]


class Added(nn.Module):
    """One layer with a bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 6), nn.Linear(6, 9, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(site.path, operator.value, layer.beft_bias[ADAPTER], lambda t: t.view(-1))


@pytest.mark.parametrize("training", [False, True])
@against("peft 0.21", "bitfit")
def test_beside_peft(training: bool) -> None:
    """Outputs, gradients and the count; our value is the whole bias, so peft is given what is more than the model's."""
    torch.manual_seed(0)
    options = {"target": ["first", "second"], "add_missing_bias": True, "head": False, "dtype": "float64"}
    config = peft.BeftConfig(target_modules=["first", "second"])
    both = Both(Added().double().train(training), "bitfit", options, config, pairs)
    assert sum(p.numel() for p in both.injection.parameters()) == 6 + 9
    theirs = both.tuner.model.first
    theirs.beft_bias[ADAPTER].data.sub_(both.base.first.bias.data)
    x = torch.randn(5, 12).double()
    both.assert_same_gradients(*both.assert_same_outputs(lambda model: model(x)))


def test_refusals(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    injection = peftcore.apply(model, "bitfit", target="*")
    with pytest.raises(ExportError, match="tensors other than biases of linear layers"):
        injection.save(tmp_path / "refused", format="peft")
    base = nn.Sequential(nn.Linear(6, 4))
    saved_by_peft(base, peft.BeftConfig(target_modules=["0"]), tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    save_file({name: value[:, :3].contiguous() for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"shape \(1, 3\), expected \(1, 4\)"):
        peftcore.load(base, tmp_path / "theirs")
