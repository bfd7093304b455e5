"""Adapters in one file; and on a host that is on the meta device: it has shapes and no values, and the adapter has all
of its own."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftcore
from peftcore.errors import ExportError, NoWeights
from peftcore.files.formats.native import TENSORS


def host() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def without_values() -> nn.Module:
    with torch.device("meta"):
        return host()


def saved(folder: Path, method: str, **options: Any) -> dict[str, torch.Tensor]:
    """An adapter with values that no start would give."""
    injection = peftcore.apply(host(), method, target=["0", "2"], train=["3", "4"], **options)
    for parameter in injection.parameters():
        parameter.data.normal_(0, 0.1)
    injection.save(folder)
    return load_file(folder / TENSORS)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "vera", "boft", "ia3", "peqa", "houlsby_adapter"])
def test_all_values_of_the_file_are_there(method: str, tmp_path: Path) -> None:
    """Also of what starts from the host's weights: magnitudes, principal parts, and heads that were trained along."""
    values = saved(tmp_path / "adapter", method)
    model = without_values()
    own = list(model.parameters())
    injection = peftcore.load(model, tmp_path / "adapter")
    assert not any(each.is_meta for each in injection.parameters())
    assert all(each.is_meta for each in own)
    injection.save(tmp_path / "again")
    again = load_file(tmp_path / "again" / TENSORS)
    assert again.keys() == values.keys() and all(torch.equal(again[key], values[key]) for key in values)


def test_the_adapter_acts_once_the_host_has_values(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", "dora")
    real, model, x = host(), without_values(), torch.randn(5, 12)
    peftcore.load(real, tmp_path / "adapter")
    peftcore.load(model, tmp_path / "adapter")
    model.load_state_dict(host().state_dict(), assign=True)
    assert torch.equal(model(x), real(x)) and not torch.equal(model(x), host()(x))


def test_what_is_nothing_without_values_is_refused(tmp_path: Path) -> None:
    """SVDiff keeps shifts of singular values, and not the singular vectors of the host."""
    injection = peftcore.apply(host(), "svdiff", target=["0", "2"])
    injection.save(tmp_path / "adapter")
    model = without_values()
    before = [(name, id(each), type(each)) for name, each in (*model.named_modules(), *model.named_parameters())]
    with pytest.raises(NoWeights, match="svdiff computes start values from its weights"):
        peftcore.load(model, tmp_path / "adapter")
    assert not peftcore.injections(model)
    after = [(name, id(each), type(each)) for name, each in (*model.named_modules(), *model.named_parameters())]
    assert after == before


def test_a_file_that_knows_its_base_by_values_needs_them(tmp_path: Path) -> None:
    peftcore.apply(host(), "lora", target=["0"]).save(tmp_path / "adapter", weights=True)
    with pytest.raises(NoWeights, match="its weights are needed"):
        peftcore.load(without_values(), tmp_path / "adapter")


def test_saving_what_depends_on_values_writes_nothing(tmp_path: Path) -> None:
    """The note of which values the base has."""
    peftcore.apply(host(), "lora", target=["0"]).save(tmp_path / "adapter")
    injection = peftcore.load(without_values(), tmp_path / "adapter")
    with pytest.raises(NoWeights):
        injection.save(tmp_path / "again", weights=True)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("format", ["peftcore", "kohya", "diffusers"])
def test_a_path_with_the_ending_of_a_file_is_one_file(format: str, tmp_path: Path) -> None:
    injection = peftcore.apply(host(), "lora", target=["0", "2"], rank=2)
    injection.operators["0"].B.data.normal_()
    path = tmp_path / "loras" / "style.v1.safetensors"
    injection.save(path, format=format)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    injection.save(tmp_path / "folder", format=format)
    (written,) = (tmp_path / "folder").glob("*.safetensors")
    assert path.read_bytes() == written.read_bytes()
    model, x = host(), torch.randn(3, 12)
    peftcore.load(model, path)
    torch.testing.assert_close(model(x), injection.model(x))
    injection.save(path, format=format)  # over the earlier one
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_what_is_no_file_of_its_own_is_refused(tmp_path: Path) -> None:
    injection = peftcore.apply(host(), "lora", target=["0", "2"], rank=2)
    for name, formats, why in (
        ("style.safetensors", "peft", "an adapter in the format peft has several files"),
        ("style.safetensors", ["kohya", "peftcore"], "an adapter in the format kohya and peftcore has several files"),
        ("style.pt", "kohya", "peftcore writes no pickles"),
        ("style.bin", "peft", "peftcore writes no pickles"),
    ):
        with pytest.raises(ExportError, match=rf"style\..* is the name of a file, and {why}; pass a folder"):
            injection.save(tmp_path / name, format=formats)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="no format 'zip'"):
        injection.save(tmp_path / "style.safetensors", format="zip")


def test_a_folder_of_such_a_name_stays_one(tmp_path: Path) -> None:
    injection = peftcore.apply(host(), "lora", target=["0", "2"], rank=2)
    (tmp_path / "old.safetensors").mkdir()
    injection.save(tmp_path / "old.safetensors")
    injection.save(tmp_path / "v1.5")
    assert (tmp_path / "old.safetensors" / TENSORS).is_file()
    assert (tmp_path / "v1.5" / TENSORS).is_file()


def test_only_partial_files_of_its_own_are_cleared_beside_a_file(tmp_path: Path) -> None:
    for name in (".a.safetensors.00.partial", ".b.safetensors.00.partial"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    peftcore.apply(host(), "lora", target=["0", "2"], rank=2).save(tmp_path / "a.safetensors")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".b.safetensors.00.partial", "a.safetensors"]


@pytest.mark.parametrize("changed", [False, True])
def test_what_was_trained_before_the_model_changed_is_saved_with_a_warning(
    changed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = host()
    injection = peftcore.apply(model, "lora", target=["0", "2"])
    for parameter in injection.parameters():
        nn.init.normal_(parameter)
    expected = dict(injection.state_dict())
    if changed:
        model[2] = nn.Linear(8, 8)
    injection.save(tmp_path)
    assert [record.message.startswith("the adapter is saved") and "2 was replaced" in record.message
            for record in caplog.records] == [True] * changed  # fmt: skip
    again = peftcore.load(host(), tmp_path)
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
