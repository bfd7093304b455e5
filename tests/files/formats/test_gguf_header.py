"""Headers of GGUF: what the package gguf writes is read, and a damaged file is one error that names it."""

from pathlib import Path

import pytest
import torch
from gguf_files import PAIR, written

from peftcore.errors import CheckpointError
from peftcore.files.formats.gguf_header import GGUFFile

gguf = pytest.importorskip("gguf")


def test_options_and_tensors_of_all_kinds(tmp_path: Path) -> None:
    said = {"a_text": "é", "a_flag": True, "a_count": -3, "a_number": 0.1, "a_list": ["x", "yz"], "an_array": [1, 2]}
    tensors = {**PAIR, "half": torch.ones(3, dtype=torch.float16), "cube": torch.ones(2, 3, 4, dtype=torch.float64)}
    path = written(tmp_path / "a.gguf", "adapter", tensors, **said)
    read, file = gguf.GGUFReader(path), GGUFFile(path)
    found = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
    assert (
        file.options == found and {key.replace("_", "."): value for key, value in said.items()}.items() <= found.items()
    )
    assert {name: torch.Size(each.shape) for name, each in tensors.items()} == file.shapes
    assert {name: each.dtype for name, each in tensors.items()} == file.dtypes


def test_packed_tensors_have_shapes_and_no_dtype(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    packed = gguf.quants.quantize(torch.ones(2, 64).numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("x.lora_a", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    assert GGUFFile(path).shapes == {"x.lora_a": torch.Size([2, 64])}
    with pytest.raises(CheckpointError, match=r"x\.lora_a has dtype the packed type 8"):
        _ = GGUFFile(path).dtypes


def test_a_damaged_file_is_one_error_that_names_it(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", "adapter", PAIR, adapter_type="lora", general_tags=["a"])
    whole, damaged = path.read_bytes(), tmp_path / "b.gguf"
    header = whole.rindex(b"lora_b") + len("lora_b") + 4 + 2 * 8 + 4 + 8
    damaged.write_bytes(whole[:header])
    assert GGUFFile(damaged).header == GGUFFile(path).header
    for length in range(header):
        damaged.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"b\.gguf cannot be read as GGUF: it (is cut off|does not begin)"):
            _ = GGUFFile(damaged).header
    for place in range(header):  # lengths that are too large, kinds that do not exist
        for byte in (0xFF, 0x7F, 0x09):
            damaged.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                _ = GGUFFile(damaged).header
            except CheckpointError as error:
                assert "b.gguf" in str(error)
