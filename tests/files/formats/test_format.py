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


def test_what_is_only_read_is_not_written() -> None:
    with pytest.raises(ExportError, match="read from files of adapterhub, not written"):
        AdapterHub().files(adapted())
