"""What a file says about itself, without a host and without its values."""

from pathlib import Path

import pytest
import torch
from file_toys import adapted
from safetensors.torch import save_file

from peftcore.errors import CheckpointError
from peftcore.files.formats.description import Description, tensor_files, trouble, unique
from peftcore.files.save_load import describe


def test_sizes_are_counted_from_headers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(5, dtype=torch.int8)}, tmp_path / "two.safetensors")
    (tmp_path / "notes.txt").write_text("none of it")
    files = tensor_files(tmp_path)
    assert [file.path.name for file in files] == ["one.safetensors", "two.safetensors"]
    description = Description("none", files)
    assert description.values == 2 * 3 + 4 + 5 and description.bytes == 4 * 6 + 2 * 4 + 5
    assert Description("none", tensor_files(tmp_path / "two.safetensors")).values == 5


def test_an_adapter_of_ours_says_its_method_and_its_sites(tmp_path: Path) -> None:
    injection = adapted()
    injection.save(tmp_path / "adapter")
    found = describe(tmp_path / "adapter")
    assert (found.format, found.methods, found.problem) == ("peftcore", ("lora",), "")
    assert found.options["rank"] == 64 and set(found.sites) == {site.path for site in injection.sites}
    assert found.values == sum(parameter.numel() for parameter in injection.parameters())


def test_trouble_is_an_error_of_ours_in_words() -> None:
    def refused() -> None:
        raise CheckpointError("no adapter")

    assert trouble(refused) == "no adapter" and trouble(lambda: None) == ""
    with pytest.raises(ZeroDivisionError):
        trouble(lambda: 1 / 0)


def test_each_once_in_order() -> None:
    assert unique(["b", "a", "b", "c", "a"]) == ("b", "a", "c")
