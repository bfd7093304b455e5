"""Files of llama.cpp, by the package gguf."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAIR = {"blk.0.attn_q.weight.lora_a": torch.ones(2, 4), "blk.0.attn_q.weight.lora_b": torch.ones(6, 2)}


def written(path: Path, kind: str, tensors: dict[str, Tensor], **options: Any) -> Path:
    """A file of that ``general.type``, with numbers, texts and lists as options; ``_`` stands for ``.``."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for key, value in options.items():
        add = {str: writer.add_string, list: writer.add_array, bool: writer.add_bool, int: writer.add_int16}
        add.get(type(value), writer.add_float64)(key.replace("_", "."), value)
    for name, value in tensors.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
