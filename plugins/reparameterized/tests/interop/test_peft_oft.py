"""OFT in folders of peft, both ways, with the Neumann series and without."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(12, 7), (2, 3, 12)),
    "pointwise": (lambda: nn.Conv2d(12, 6, 1, stride=2), (2, 12, 3, 4)),
    "table": (lambda: nn.Embedding(9, 12), None),
}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({"use_cayley_neumann": False}, {}),
    "series": ({}, {"series": 5}),
    "longer": ({"num_cayley_neumann_terms": 7}, {"series": 7}),
    "shorter": ({"num_cayley_neumann_terms": 3}, {"series": 4}),
    "shared": ({"use_cayley_neumann": False, "block_share": True}, {"block_share": True}),
    "constrained": ({"use_cayley_neumann": False, "coft": True, "eps": 0.1}, {"eps": 0.1 / 16}),
    "all": ({"coft": True, "eps": 0.1, "block_share": True}, {"eps": 0.1 / 16, "block_share": True, "series": 5}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_both_ways(name: str, form: str, tmp_path: Path) -> None:
    (build, shape), (theirs, ours) = LAYERS[name], FORMS[form]
    base, x = One(build()), torch.randn(shape) if shape else torch.randint(9, (4, 9))
    config = peft.OFTConfig(target_modules=["layer"], oft_block_size=4, **theirs)
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    found = injection.config.model_dump(exclude={"method", "overrides"})
    plain = {"block_size": 4, "block_share": False, "eps": None, "series": None, "block_dropout": 0.0, "side": "inputs"}
    assert found == plain | {"constraint": None, "rescaled": False} | ours
    written = assert_writes(base, "oft", {"target": "layer", "block_size": 4, **ours}, lambda model: model(x), tmp_path)
    if "eps" in theirs:
        assert written["eps"] == theirs["eps"]


def test_widths_are_those_of_the_tensors(tmp_path: Path) -> None:
    """Blocks that are said by their number differ from site to site."""
    base, x = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6)), torch.randn(4, 12)
    config = peft.OFTConfig(target_modules=["0", "2"], r=2, oft_block_size=0, bias="oft_only")
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert [injection.config.at(path).block_size for path in ("0", "2")] == [6, 4]
    base, x = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6)), torch.randn(4, 12)
    options = {"target": ["0", "2"], "block_size": 4, "train": ["0.bias", "2.bias"]}  # 5 at the second, as in peft
    written = assert_writes(base, "oft", options, lambda model: model(x), tmp_path)
    assert (written["oft_block_size"], written["bias"]) == (4, "oft_only")


def test_refusals(tmp_path: Path) -> None:
    injection = peftcore.apply(One(nn.Conv2d(4, 6, 3)), "oft", target="layer", block_size=4)
    with pytest.raises(ExportError, match="something else with kernels or groups above 1"):
        injection.save(tmp_path / "kernel", format="peft")
    saved_by_peft(
        One(nn.Conv2d(4, 6, 3)), peft.OFTConfig(target_modules=["layer"], oft_block_size=4), tmp_path / "theirs"
    )
    with pytest.raises(CheckpointError, match="something else with kernels or groups above 1"):
        peftcore.load(One(nn.Conv2d(4, 6, 3)), tmp_path / "theirs")
    for own in ({"constraint": 0.1}, {"rescaled": True}):
        injection = peftcore.apply(One(nn.Linear(12, 6)), "oft", target="layer", block_size=4, **own)
        with pytest.raises(ExportError, match="constraint= and rescaled=True, which it does not have"):
            injection.save(tmp_path / "own", format="peft")
    options = {"target": "layer", "block_size": 4, "eps": 0.1}
    with pytest.raises(ExportError, match="block_size=4 where it does not fit; 5 would"):
        peftcore.apply(One(nn.Linear(10, 6)), "oft", **options).save(tmp_path / "radius", format="peft")
    base = One(nn.Linear(12, 7))
    for terms in (1, 2):
        config = peft.OFTConfig(target_modules=["layer"], oft_block_size=4, num_cayley_neumann_terms=terms)
        saved_by_peft(base, config, tmp_path / "short")
        with pytest.raises(CheckpointError, match=f"'num_cayley_neumann_terms' is {terms}"):
            peftcore.load(base, tmp_path / "short")


def test_an_old_series_is_told(tmp_path: Path) -> None:
    base = One(nn.Linear(12, 7))
    saved_by_peft(base, peft.OFTConfig(target_modules=["layer"], oft_block_size=4), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace(f'"{peft.__version__}"', '"0.17.1"'))
    with pytest.warns(UserWarning, match=r"made by peft 0\.17\.1, which had another Neumann series") as told:
        peftcore.load(base, tmp_path)
    assert len(told) == 1
