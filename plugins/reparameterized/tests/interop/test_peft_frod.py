"""FRoD in folders of peft, both ways; what peft makes of a V that it does not find itself."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_folders import assert_reads, assert_writes, saved_by_peft
from peft_pairs import OUTPUTS, difference
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import CheckpointError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
TARGET = ["up", "down", "last"]


class Blocks(nn.Module):
    """Two blocks, whose layers share V by their names, and one that is stored the other way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = [nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(2)]
        self.blocks, self.last = nn.ModuleList(pairs), Conv1D(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["down"](torch.tanh(block["up"](x)))
        return self.last(x)


def test_both_ways(tmp_path: Path) -> None:
    base, x = Blocks(), torch.randn(2, 3, 6)
    config = peft.FrodConfig(
        target_modules=TARGET, sparse_rate=0.1, frod_dropout=0.2, projection_prng_key=3, regularization_alpha=0.01,
        bias="frod_only", progressbar=False,
    )  # fmt: skip
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    assert found == {"sparsity": 0.1, "ridge": 0.01, "dropout": 0.2, "projection_seed": 3}
    options: dict[str, Any] = {"target": TARGET, "sparsity": 0.2, "projection_seed": 5, "dropout": 0.1}
    written = assert_writes(base, "frod", options, lambda model: model(x), tmp_path)
    expected = {"sparse_rate": 0.2, "projection_prng_key": 5, "frod_dropout": 0.1, "save_projection": True}
    assert expected == {name: written[name] for name in expected}


def test_u_is_made_of_the_v_in_the_file(tmp_path: Path) -> None:
    """Another machine's eigenvectors, here with other signs: the adapter that was trained there is what is computed.
    peft, which makes U of the V that it finds itself, computes another; so it gets no such file from here."""
    base, x = Blocks().eval(), torch.randn(2, 3, 6)
    config = peft.FrodConfig(target_modules=["up"], sparse_rate=0.3, progressbar=False)
    trained = saved_by_peft(base, config, tmp_path)(x).detach()
    file = tmp_path / "adapter_model.safetensors"
    tensors, signs = load_file(file), torch.tensor([1.0, -1, 1, 1, -1, -1])
    rows, cols = tensors["base_model.frod_s_indices.up"]
    tensors["base_model.frod_V.up"] *= signs
    for name, values in tensors.items():
        if name.endswith("frod_lambda_s_values"):
            values.mul_(signs[rows] * signs[cols])
    save_file(tensors, file, {"format": "pt"})
    ours = deepcopy(base)
    injection = peftcore.load(ours, tmp_path)
    assert difference(ours(x).detach(), trained) <= OUTPUTS
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path)).eval()
    assert difference(theirs(x).detach(), trained) > 0.1
    with pytest.raises(ExportError, match="peft computes V from the model"):
        injection.save(tmp_path / "again", format="peft")
    injection.save(tmp_path / "native")
    again = deepcopy(base)
    peftcore.load(again, tmp_path / "native")
    assert torch.equal(again(x), ours(x))


def test_refusals(tmp_path: Path) -> None:
    base = Blocks()
    config = peft.FrodConfig(target_modules=["up"], save_projection=False, progressbar=False)
    saved_by_peft(base, config, tmp_path / "without")
    with pytest.raises(CheckpointError, match="save_projection is false"):
        peftcore.load(deepcopy(base), tmp_path / "without")
    config = peft.FrodConfig(target_modules=["up"], progressbar=False)
    saved_by_peft(base, config, tmp_path / "strange")
    file = tmp_path / "strange" / "adapter_model.safetensors"
    for change, message in (
        ({"base_model.frod_V.up": torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0]))}, "directions of the weight"),
        ({"base_model.frod_V.up": torch.eye(5)}, "missing frod_V.up of shape"),
        ({"base_model.frod_s_indices.up": torch.tensor([[2], [6]])}, "outside of a matrix of 6 by 6"),
    ):
        held = load_file(file)
        save_file({**held, **change}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            peftcore.load(deepcopy(base), tmp_path / "strange")
        save_file(held, file, {"format": "pt"})
    options = json.loads((tmp_path / "strange" / "adapter_config.json").read_text())
    (tmp_path / "strange" / "adapter_config.json").write_text(json.dumps({**options, "sparse_rate": 0.5}))
    with pytest.raises(CheckpointError, match="expected"):
        peftcore.load(deepcopy(base), tmp_path / "strange")


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(nn.Conv2d(4, 6, 3)), "frod", target="0")
    with pytest.raises(ExportError, match="not a layer that peft adapts this way"):
        injection.save(tmp_path / "conv", format="peft")
    model = nn.ModuleDict({"a": nn.ModuleDict({"up": nn.Linear(4, 6)}), "a_up": nn.Linear(6, 4)})
    injection = peftcore.apply(model, "frod", target=["a.up", "a_up"])
    with pytest.raises(ExportError, match="one V for all of a_up"):
        injection.save(tmp_path / "widths", format="peft")
    model = Blocks()
    injection = peftcore.apply(model, "frod", target=["up"])
    with torch.no_grad():
        model.blocks[0]["up"].weight.mul_(2)
    with pytest.raises(ExportError, match="the weights or the machine are others"):
        injection.save(tmp_path / "weights", format="peft")
