"""What trains whole in files of LyCORIS, both ways, with the real LyCORIS on a small UNet: norms, weights, biases."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris_files import of_inputs, read_by_them, read_into_their_network, theirs, unet
from pipeline_models import assert_same, out
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.kohya import TENSORS
from peftcore.testing.hosts import HOSTS

LINEAR, NORMS = [".*to_[qkv]", ".*conv[12]", ".*net.0.proj"], [".*norm[123]?$"]
FORMS: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "full": (LINEAR, {"network_module": "full"}, ["attention_only"]),
    "norm": (NORMS, {"train_norm": True}, ["ln_tuning"]),
    "full and norm": (LINEAR + NORMS, {"network_module": "full", "train_norm": True}, ["attention_only", "ln_tuning"]),
    "lora and norm": (LINEAR + NORMS, {"network_module": "locon", "train_norm": True}, ["ln_tuning", "lora"]),
}
"""Where theirs stands, its options, our methods."""


@pytest.mark.parametrize("form", FORMS)
def test_both_ways(form: str, tmp_path: Path) -> None:
    names, options, methods = FORMS[form]
    if len(methods) > 1:
        pytest.importorskip("peftcore_hybrid")
    model, inputs = unet()
    base, file = deepcopy(model), tmp_path / "their.safetensors"
    expected = theirs(model, file, 0.1, names=names, **options)
    injection = peftcore.load(model, file)
    assert sorted({part.method.name for part in injection.parts.values()} or {injection.method.name}) == methods
    for ours, its, before in zip(*(of_inputs(each, inputs) for each in (model, expected, base)), strict=True):
        assert_same(ours, its, before)
    injection.save(tmp_path / "ours")
    again = deepcopy(base)
    peftcore.load(again, tmp_path / "ours")
    assert torch.equal(out(again, inputs), out(model, inputs))
    injection.save(tmp_path / "back", format="kohya/lycoris")
    before, after = load_file(file), load_file(tmp_path / "back" / TENSORS)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-5, check_dtype=False)
    for host in (
        read_by_them(deepcopy(base), tmp_path / "back"),
        read_into_their_network(base, tmp_path / "back", names=names, **options),
    ):
        assert_same(out(model, inputs), out(host, inputs), out(unet()[0], inputs))


@pytest.mark.parametrize("method", ["attention_only", "linear_probe", "partial_k"])
def test_what_they_read(method: str, tmp_path: Path) -> None:
    """Methods that replace tensors, each at linear maps, convolutions and norms."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8))
    x, target = {"input": torch.randn(3, 6)}, ["0", "1", "2"]
    if method == "partial_k":
        (model, x), target = HOSTS["vit"].build(), ["attn.*", "norm.*"]
    base = deepcopy(model)
    injection = peftcore.apply(model, method, target=target)
    for parameter in injection.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    injection.save(tmp_path, format="kohya/lycoris")
    expected = read_by_them(base, tmp_path)
    assert_same(out(model, x), out(expected, x), out(base, x))


@pytest.mark.parametrize(
    ("layer", "tensors", "message"),
    [
        (nn.Linear(4, 6), {"diff": torch.ones(6, 5)}, r"diff has shape \(6, 5\), expected \(6, 4\)"),
        (nn.Linear(4, 6), {"diff": torch.ones(6, 4), "diff_b": torch.ones(4)}, r"diff_b has shape \(4,\)"),
        (nn.Linear(4, 6, bias=False), {"diff": torch.ones(6, 4), "diff_b": torch.ones(6)}, "unknown .*diff_b"),
        (nn.Linear(4, 6), {"diff_b": torch.ones(6)}, "no installed plugin reads diff_b"),
        (nn.LayerNorm(6), {"w_norm": torch.ones(5)}, r"w_norm has shape \(5,\)"),
        (nn.LayerNorm(6, bias=False), {"w_norm": torch.ones(6), "b_norm": torch.ones(6)}, "unknown .*b_norm"),
    ],
)
def test_refused(layer: nn.Module, tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file({f"lycoris_0.{name}": value for name, value in tensors.items()}, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(nn.Sequential(layer), tmp_path)


def test_what_leaves_out_the_bias(tmp_path: Path) -> None:
    save_file({"lycoris_0.diff": torch.ones(6, 4)}, tmp_path / TENSORS)
    model = nn.Sequential(nn.Linear(4, 6))
    expected, x = nn.functional.linear(x := torch.randn(3, 4), model[0].weight + 1, model[0].bias), x
    peftcore.load(model, tmp_path)
    torch.testing.assert_close(model(x), expected)


def test_tables_are_not_written(tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(nn.Embedding(4, 6)), "linear_probe", target="0")
    with pytest.raises(ExportError, match="whole linear layers, convolutions and norms, not 0"):
        injection.save(tmp_path / "adapter", format="kohya")
