"""Formats by name, and which one a folder is of."""

from pathlib import Path

import pytest
from file_toys import adapted

from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.adapterhub import AdapterHub
from peftcore.files.formats.format import format_named, formats, held_by, recognize


def test_our_own_is_asked_first_and_each_has_its_name() -> None:
    assert next(iter(formats())) == "peftcore"
    assert all(kind.name == name for name, kind in formats().items())


def test_a_part_stands_behind_a_slash() -> None:
    assert format_named("diffusers/text_encoder_2").part == "text_encoder_2" and format_named("peft").part == ""
    with pytest.raises(ExportError, match="no format 'zip'; there are: peftcore"):
        format_named("zip")
    with pytest.raises(ExportError, match="have no part 'unet'; the parts that they can have: none"):
        format_named("peft/unet")


@pytest.mark.parametrize("name", ["peftcore", "peft"])
def test_a_folder_is_recognized_by_its_files(name: str, tmp_path: Path) -> None:
    adapted().save(tmp_path / "adapter", format=name)
    assert recognize(tmp_path / "adapter").name == name


def test_what_is_none_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        recognize(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("no adapter")
    with pytest.raises(CheckpointError, match=r"it holds notes\.txt"):
        recognize(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a pickle, which can run any code"):
        held_by(tmp_path)


STATE = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state.pth", "training_args.bin", "scaler.pt")


def checkpoint(folder: Path) -> Path:
    """What transformers' Trainer writes beside the model."""
    folder.mkdir(parents=True)
    for name in (*STATE, "trainer_state.json", "model.safetensors", "config.json"):
        (folder / name).write_bytes(b"")
    return folder


def test_a_checkpoint_of_a_training_is_called_one(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out" / "checkpoint-4")
    with pytest.raises(
        CheckpointError, match=r"a checkpoint of transformers' Trainer.*without a file of an adapter"
    ) as told:
        recognize(folder)
    assert "optimizer.pt" not in str(told.value)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a checkpoint of transformers' Trainer"):
        recognize(folder)
    (folder / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"keeps its tensors in pytorch_model\.bin"):
        recognize(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"it holds config\.json, model\.safetensors, optimizer\.pt"):
        recognize(folder)


def test_adapters_further_down_are_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint-4")
    adapted().save(folder / "lora")
    adapted().save(folder / "other", format="peft")
    (folder / "runs").mkdir()
    with pytest.raises(CheckpointError, match=r"it contains adapters: lora, other$"):
        recognize(folder)
    adapted().save(folder)
    assert recognize(folder).name == "peftcore"


def test_what_is_only_read_is_not_written() -> None:
    with pytest.raises(ExportError, match="reads files of adapterhub, but does not write them"):
        AdapterHub().files(adapted())
