"""Where examples come from: what says the same in each, and what is refused."""

import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, SplitDict, SplitInfo, Value
from datasets.arrow_writer import ArrowWriter

from peftcore.errors import BadInput
from peftcore_lab.data.example_sources import digest, read, scored, splits
from peftcore_lab.data.texts import SPLIT_SEED
from peftcore_lab.digests import of_content


def test_parquet_and_saved_datasets_say_the_same_as_a_table(csv_file: Path, rows: list[Any], tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    saved = Dataset.from_list([{"text": row["text"], "label": row["label"]} for row in rows], features=features)
    saved.save_to_disk(tmp_path / "saved")
    Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    expected = splits(str(csv_file), None, 20)
    for path in (tmp_path / "saved", tmp_path / "table.parquet"):
        found = splits(str(path), None, 20)
        assert found.train["text"][:] == expected.train["text"][:]
        assert found.held_out["label"][:] == expected.held_out["label"][:]


def test_a_dataset_has_splits_of_its_own(rows: list[Any], tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_list(rows[:90]), validation=Dataset.from_list(rows[90:])).save_to_disk(
        tmp_path / "d"
    )
    found = splits(str(tmp_path / "d"), None, None)
    assert (len(found.train), len(found.held_out)) == (90, 30)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("train", "test"), "test"),
        (("train", "validation"), "validation"),
        (("test", "train", "validation"), "validation"),
        (("train",), "train"),
        (("other",), "other"),
    ],
)
def test_of_several_splits_the_one_for_it_is_scored(names: tuple[str, ...], chosen: str, tmp_path: Path) -> None:
    """Not the first one, which is most often that of the training."""
    parts = {name: Dataset.from_list([{"text": f"{name} {n}", "label": n} for n in range(4)]) for name in names}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    Dataset.from_list([{"text": "mine", "label": 0}] * 3).save_to_disk(tmp_path / "mine")
    found = splits(str(tmp_path / "mine"), str(tmp_path / "saved"), None)
    assert {*found.train["text"]} == {"mine"} and found.held_out["text"][0] == f"{chosen} 0"
    assert scored(str(tmp_path / "saved" / names[0]))["text"][0] == f"{names[0]} 0"  # a split is a dataset as well


def test_splits_of_which_none_is_to_be_scored_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": "a", "label": 0}] * 3)
    DatasetDict(train=rows, holdout=rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadInput, match=r"its splits are train, holdout. Pass the folder of one split, .*saved.holdout"):
        splits(str(tmp_path / "saved"), str(tmp_path / "saved"), None)
    assert len(splits(str(tmp_path / "saved"), str(tmp_path / "saved" / "holdout"), None).held_out) == 3


def test_rows_are_named_as_they_stand_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "many.csv"
    path.write_text("text\n" + "".join(f"{number}\n" for number in range(1, 21)), encoding="utf-8")
    found = splits(str(path), None, 5)
    for source, part in found.named:
        for index, text in enumerate(part["text"]):
            assert source.row(index) == f"{path}, row {text}"
        assert source.selected([2, 0]).row(0) == f"{path}, row {part['text'][2]}"
    cut = Dataset.from_dict({"text": [*range(20)]}).train_test_split(test_size=5, seed=SPLIT_SEED)
    assert [*found.held_out["text"]] == [str(each + 1) for each in cut["test"]["text"]]  # the split that always was
    other = splits(str(path), str(path), None)
    assert other.names[1].row(3) == f"{path}, row 4"


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.xlsx").write_bytes(b"")
    for name in ("bad.parquet", "empty", "table.xlsx", "nothing/there"):
        with pytest.raises(BadInput, match=name):
            splits(str(tmp_path / name), None, None)


def cached(cache: Path, commit: str, texts: list[str], time: int) -> None:
    """Write a commit of the dataset someone/texts into the cache of `datasets`, as a download leaves it."""
    folder = cache / "someone___texts" / "default" / "0.0.0" / commit
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / "texts-train.arrow")) as writer:
        for text in texts:
            writer.write({"text": text})
        rows, size = writer.finalize()
    info = DatasetInfo(Features({"text": Value("string")}), version="0.0.0", dataset_name="texts")
    info.splits = SplitDict(dataset_name="texts")
    info.splits.add(SplitInfo("train", num_bytes=size, num_examples=rows, dataset_name="texts"))
    info.builder_name, info.config_name = "parquet", "default"
    info.write_to_directory(str(folder))
    os.utime(folder, (time, time))


def test_the_digest_of_a_dataset_on_the_hub_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert digest("someone/texts") is None and digest(str(tmp_path / "none.csv")) is None
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        cached(tmp_path / "cache", commit, ["same", commit], 1_000_000 + number)
        assert digest("someone/texts") == commit and read("someone/texts")["train"]["text"][1] == commit


def test_the_digest_of_a_file_is_that_of_its_content(csv_file: Path) -> None:
    assert digest(str(csv_file)) == of_content(str(csv_file))
