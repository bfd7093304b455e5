"""PiSSA, OLoRA, LoRA+ and LoRA-XS in folders of peft: it takes a part out of the base anew when it loads the first
two."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes, saved_by_peft
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import CheckpointError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(12, 7), (2, 3, 12)),
    "transposed": (lambda: Conv1D(7, 12), (2, 3, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 7, 6)),
    "table": (lambda: nn.Embedding(9, 5), None),
}
READ = [("pissa", "linear"), ("pissa", "transposed"), ("olora", "linear")]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("method", "name"), READ)
def test_read(method: str, name: str, rslora: bool, tmp_path: Path) -> None:
    """The base that peft keeps in memory is not the host's; loaded again it takes the same part out of that."""
    build, shape = LAYERS[name]
    base, x = One(build()), torch.randn(shape)
    config = peft.LoraConfig(
        target_modules=["layer"], r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights=method, bias="lora_only"
    )
    injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert injection.method.name == method
    assert injection.config.rank == 4 and injection.config.alpha == (12.0 if rslora else 6.0)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("method", "name"), READ)
def test_read_beside_dora(method: str, name: str, rslora: bool, tmp_path: Path) -> None:
    """What is taken out of the base is in the direction of DoRA, as a second pair of factors."""
    build, shape = LAYERS[name]
    base, x = One(build()), torch.randn(shape)
    config = peft.LoraConfig(
        target_modules=["layer"], r=3, lora_alpha=6, use_rslora=rslora, init_lora_weights=method, use_dora=True
    )
    with pytest.warns(UserWarning, match="twice the rank"):
        injection = assert_reads(base, config, lambda model: model(x), tmp_path)
    assert (injection.method.name, injection.config.rank) == ("dora", 6)


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("name", LAYERS)
def test_written_as_lora_of_twice_the_rank(name: str, method: str, tmp_path: Path) -> None:
    build, shape = LAYERS[name]
    base, x = One(build()), torch.randn(shape) if shape else torch.randint(9, (4, 9))
    written = assert_writes(
        base, method, {"target": "layer", "rank": 3, "alpha": 5.0}, lambda model: model(x), tmp_path
    )
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (6, 10.0, True)


def test_written_where_a_weight_has_fewer_directions(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 12)
    assert_writes(base, "pissa", {"target": ["0", "2"], "rank": 4}, lambda model: model(x), tmp_path)


@pytest.mark.parametrize("name", LAYERS)
def test_lora_xs_is_written_as_lora(name: str, tmp_path: Path) -> None:
    build, shape = LAYERS[name]
    base, x = One(build()), torch.randn(shape) if shape else torch.randint(9, (4, 9))
    options = {"target": "layer", "rank": 8, "alpha": 16.0}  # more than there are directions
    written = assert_writes(base, "lora_xs", options, lambda model: model(x), tmp_path)
    assert (written["r"], written["lora_alpha"]) == (8, 16.0)


@pytest.mark.parametrize("scaling", ["rank", "sqrt_rank"])
def test_lora_plus_is_written_as_lora(scaling: str, tmp_path: Path) -> None:
    """Its rates act while it trains only."""
    base, x = One(nn.Linear(12, 7)), torch.randn(4, 12)
    options = {"target": "layer", "rank": 3, "alpha": 9.0, "scaling": scaling, "ratio": 4.0, "dropout": 0.1}
    written = assert_writes(base, "lora_plus", options, lambda model: model(x), tmp_path)
    assert (written["use_rslora"], written["lora_dropout"]) == (scaling == "sqrt_rank", 0.1)


def test_refusals(tmp_path: Path) -> None:
    base = One(nn.Linear(12, 7))
    for name, extra in (("plain", {}), ("dora", {"use_dora": True})):
        config = peft.LoraConfig(target_modules=["layer"], r=3, init_lora_weights="pissa_niter_4", **extra)
        saved_by_peft(base, config, tmp_path / name)
        with pytest.raises(CheckpointError, match="init_lora_weights"):
            peftcore.load(base, tmp_path / name)
    base = One(Conv1D(7, 12))  # what peft decomposes of its transposed weight does not fit the layer
    saved_by_peft(base, peft.LoraConfig(target_modules=["layer"], r=3, init_lora_weights="pissa"), tmp_path / "stored")
    text = (tmp_path / "stored" / "adapter_config.json").read_text()
    (tmp_path / "stored" / "adapter_config.json").write_text(text.replace('"pissa"', '"olora"'))
    with pytest.raises(CheckpointError, match="not one of the layers that peft decomposes for olora"):
        peftcore.load(base, tmp_path / "stored")
    base = One(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ExportError, match="padding_mode='reflect'"):
        peftcore.apply(base, "lora", target="layer", rank=3).save(tmp_path / "padding", format="peft")
