"""Whether files are still what they were."""

import os
from pathlib import Path

from datasets import Dataset

from peftcore_lab.digests import SAMPLE, of_content, of_sample


def test_content_counts_and_nothing_else(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("text,label\na,1\n", encoding="utf-8")
    two.write_text("text,label\na,1\n", encoding="utf-8")
    os.utime(two, (1, 1))
    first = of_content(str(one))
    assert first == of_content(str(two)) is not None and of_content(str(tmp_path / "someone/dataset")) is None
    one.write_text("text,label\na,2\n", encoding="utf-8")  # as long as it was
    os.utime(one, (1, 1))
    assert of_content(str(one)) != first


def test_folders_are_their_files_and_saved_datasets_their_rows(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(tmp_path / name)
    first = of_content(str(tmp_path / "one"))
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"x")
    (tmp_path / "one" / "state.json").write_text("{}")
    assert of_content(str(tmp_path / "one")) == first == of_content(str(tmp_path / "two"))
    (tmp_path / "one" / "more.arrow").write_bytes(b"x")
    assert of_content(str(tmp_path / "one")) != first


def test_of_large_files_some_bytes_are_read(tmp_path: Path) -> None:
    path, size = tmp_path / "model.bin", 10 * SAMPLE
    found = set()
    for place in (None, 0, size // 2, size - 1):
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        os.utime(path, (1, 1 if place is None else place + 2))
        found.add(of_sample(str(path)))
    path.write_bytes(bytes(size + 1))
    assert len(found | {of_sample(str(path))}) == 5
