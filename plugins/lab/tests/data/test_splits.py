"""Examples to choose by are cut once, from examples that stay what they are."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from peftcore.errors import BadInput
from peftcore_lab.data.splits import parted


def test_parts_are_cut_once_and_not_taken_for_those_of_other_examples(csv_file: Path, tmp_path: Path) -> None:
    data: dict[str, Any] = {"train": str(csv_file)}
    first = parted(data, None, None, tmp_path / "parts")
    assert parted(data, None, None, tmp_path / "parts") == first
    with pytest.raises(BadInput, match=r"tuning_size changed since.*--out"):
        parted(data, None, 7, tmp_path / "parts")
    content = csv_file.read_bytes()
    changed = csv_file.with_name("changed.csv")
    changed.write_bytes(content)
    assert parted({"train": str(changed)}, None, None, tmp_path / "parts") == first  # the same rows
    changed.write_bytes(content + content.splitlines(keepends=True)[-1])
    with pytest.raises(BadInput, match=r"other data: data.train changed since"):
        parted({"train": str(changed)}, None, None, tmp_path / "parts")


def test_of_several_splits_the_one_to_be_scored_chooses(csv_file: Path, tmp_path: Path) -> None:
    part = {name: Dataset.from_list([{"text": name, "label": "a"}]) for name in ("train", "test")}
    DatasetDict(part).save_to_disk(tmp_path / "saved")
    chosen_by, _ = parted({"train": str(csv_file)}, str(tmp_path / "saved"), None, tmp_path / "parts")
    assert load_from_disk(chosen_by["held_out"])["text"][:] == ["test"]
