"""Writes and describes LoRA files of llama.cpp, ``adapter.gguf``. They cannot be loaded.

For a matrix of the base, such as ``blk.0.attn_q.weight``, the file has the factors ``….lora_a`` ``[rank, in]`` and
``….lora_b`` ``[out, rank]``. The file has one alpha for all matrices: the scale of each is alpha / rank. Therefore
lower ranks are padded to the largest rank, and scales are multiplied into ``lora_b``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftcore.errors import CheckpointError, ExportError, shown
from peftcore.files.formats.description import Description, unique
from peftcore.files.formats.format import Content, Files, Format, Made
from peftcore.files.formats.gguf_header import MAGIC, GGUFFile
from peftcore.files.formats.plain_lora import LowRankPair, plain_lora
from peftcore.injection.injection import Injection

FILE = "adapter.gguf"
ARCHITECTURES = Path(__file__).with_name("gguf_architectures.toml")
FACTORS = (".lora_a", ".lora_b")
TYPE = "adapter.type"
ONLY_WRITTEN = "peftcore writes files of llama.cpp, but does not load them; load the adapter that was exported"


class GGUF(Format):
    """The format of llama.cpp's adapters."""

    name = "gguf"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            return False
        with file.open("rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC

    def open(self, path: Path, model: nn.Module) -> Content:
        raise CheckpointError(f"{path}: {ONLY_WRITTEN}")

    def describe(self, path: Path) -> Description:
        file = GGUFFile(path / FILE if path.is_dir() else path)
        kind = file.options.get("general.type")
        if kind != "adapter":
            raise CheckpointError(f"{file.path} is not an adapter: its general.type is {shown(kind)}")
        names = {name for name in file.shapes if name.endswith(FACTORS)}
        lacking = [name for name in sorted(names) if not names >= {name[:-1] + each[-1] for each in FACTORS}]
        if lacking:
            raise CheckpointError(f"{file.path} has {lacking[0]} without the other factor")
        sites = unique(name.removesuffix(FACTORS[0]).removesuffix(FACTORS[1]) for name in file.shapes if name in names)
        return Description(
            self.name,
            (file,),
            kind=str(file.options.get(TYPE, "")),
            options=self.options(path),
            host=str(file.options.get("general.architecture", "")),
            sites=sites,
            problem=ONLY_WRITTEN,
        )

    def options(self, path: Path) -> Mapping[str, Any]:
        said = GGUFFile(path / FILE if path.is_dir() else path).options
        return {TYPE: "none"} | {key: value for key, value in said.items() if key.startswith("adapter.")}

    def files(self, injection: Injection, weights: bool = False) -> Files:
        architecture, config = _known(injection.model)
        pairs = plain_lora(injection, "llama.cpp")
        rank = max(len(pair.A) for pair in pairs.values())
        names = _names(architecture["name"], int(config["num_hidden_layers"]), pairs)
        heads = {leaf: int(config[count]) for leaf, count in architecture.get("rotated", {}).items()}
        tensors: dict[str, Tensor] = {}
        for path, pair in pairs.items():
            A, B = pair.filled(rank)
            leaf = path.rpartition(".")[2]
            tensors[f"{names[path]}.weight.lora_a"] = A
            tensors[f"{names[path]}.weight.lora_b"] = neighbours(B, heads[leaf]) if leaf in heads else B
        return {FILE: Made(lambda file: _write(file, architecture["name"], float(rank), tensors))}


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Returns the rows ``[heads * width, ...]`` of a projection in llama.cpp's order. Rotary embeddings rotate pairs of
    rows. In the input, the two rows of a pair are half a head apart; in the result, they are adjacent."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # [heads, 2, width / 2, ...]
    return halves.transpose(1, 2).reshape(rows.shape)


def _known(model: nn.Module) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns the entry of a model in the table of llama.cpp's architectures, and the model's configuration.

    Raises:
        ExportError: the table has no entry for the model.
    """
    known = tomllib.loads(ARCHITECTURES.read_text(encoding="utf-8"))
    config = getattr(model, "config", None)
    said: Mapping[str, Any] = {} if config is None else config.to_dict()
    kind = said.get("model_type")
    if kind not in known:
        raise ExportError(
            f"peftcore writes GGUF for {', '.join(known)}, not for {kind or 'models outside of transformers'}: save "
            'with format="peft", and convert that with convert_lora_to_gguf.py of llama.cpp'
        )
    return known[kind], said


def _names(architecture: str, blocks: int, paths: Mapping[str, LowRankPair]) -> dict[str, str]:
    """Returns the names of modules in GGUF files, keyed by the modules' paths.

    Raises:
        ExportError: a module has no such name, or the package gguf is missing.
    """
    gguf = _package()
    [arch] = [each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    table = gguf.get_tensor_name_map(arch, blocks)
    found = {path: table.get_name(path) for path in paths}
    if lacking := [path for path, name in found.items() if name is None]:
        raise ExportError(f"llama.cpp has no tensor for {lacking[0]} in its {architecture}")
    return found


def _write(file: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    gguf = _package()
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, value in tensors.items():
        writer.add_tensor(name, value.contiguous().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError("files of llama.cpp are written by the package gguf: pip install gguf") from None
    return gguf
