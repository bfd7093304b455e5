"""Files that contain only embeddings: ``clip_l``, ``clip_g`` and ``t5`` are the new rows of token tables, ``[vectors,
width]``, one tensor for each text encoder of a pipeline.

Pivotal tuning in diffusers (train_dreambooth_lora_sdxl_advanced.py, and that of Flux) writes such files in addition to
its LoRA, and sd-scripts (sdxl_train_textual_inversion.py) writes them alone. A file contains neither words nor token
ids: pass both when you load it, in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from peftcore import Injection
from peftcore.author import Surgeon
from peftcore.author.formats import (
    Content,
    Description,
    Files,
    Format,
    SavedSite,
    TensorFile,
    Tensors,
    check_no_rows,
    composed,
    names_in,
    only_file,
    only_table,
)
from peftcore.errors import CheckpointError, ExportError, HostMismatch
from peftcore_diffusion.textual_inversion import TextualInversion

TENSORS = "embeddings.safetensors"
"""The name of the file that is written into a folder; reading accepts any name if the folder has only one file."""


class Embeddings(Format):
    """The format of files that contain only embeddings."""

    name = "embeddings"
    file = TENSORS
    parts: ClassVar[tuple[str, ...]] = ("clip_l", "clip_g", "t5")

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        names = names_in(only_file(path, TENSORS))
        return bool(names) and set(names) <= set(cls.parts)

    def open(self, path: Path, model: nn.Module) -> Content:
        file = _file(path)
        shown = ", ".join(f"{name} {tuple(shape)}" for name, shape in file.shapes.items())
        raise CheckpointError(
            f"{file.path} has vectors for new tokens, but no token ids: add the tokens to the tokenizer and the table, "
            f'and load with words={{"<s0>": [id], ...}}, one id for each row of {shown}'
        )

    def open_with_words(self, path: Path, model: nn.Module, words: Mapping[str, Sequence[int]]) -> Content:
        return EmbeddingsContent(_file(path), model, words)

    def describe(self, path: Path) -> Description:
        file = _file(path)
        return Description(self.name, (file,), methods=(TextualInversion.name,), parts=tuple(file.shapes))

    def files(self, injection: Injection, weights: bool = False) -> Files:
        owners = [injection.owner(graft) for graft in injection.grafts if not graft.trained_along]
        if len(injection.grafts) != 1 or [each.method.name for each in owners] != [TextualInversion.name]:
            raise ExportError(
                f"files of {self.name} hold the rows of one textual inversion at one table, not "
                f"{injection.method.name} at {len(injection.grafts)} modules: apply and save each one separately"
            )
        if not self.part:
            named = ", ".join(f'"{self.name}/{part}"' for part in self.parts)
            raise ExportError(f"files of {self.name} record the text encoder that they are for; pass its name: {named}")
        (graft,) = injection.grafts
        operator: Any = graft.operator
        tokens = operator.tokens.tolist()
        check_no_rows(injection, self.name, {each.module_path: tokens for each in graft.holders})
        return {TENSORS: Tensors({self.part: operator.vectors.detach().contiguous()}, {"format": "pt"})}


class EmbeddingsContent(Content):
    """The rows of one file for the token table of one host."""

    def __init__(self, file: TensorFile, model: nn.Module, words: Mapping[str, Sequence[int]]) -> None:
        path, width = only_table(model, file)
        shown = ", ".join(f"{name} {tuple(shape)}" for name, shape in file.shapes.items())
        fitting = [name for name, shape in file.shapes.items() if len(shape) == 2 and shape[1] == width]
        if not fitting:
            raise HostMismatch(f"{file.path}: none of its vectors fit {path}, of width {width}: {shown}")
        if len(fitting) > 1:
            raise HostMismatch(f"{file.path}: {' and '.join(fitting)} all fit {path}; save each one in a separate file")
        tokens = [(word, int(token)) for word, ids in words.items() for token in ids]
        (self.tensor,) = fitting
        if len(tokens) != file.shapes[self.tensor][0]:
            raise CheckpointError(f"{file.path}: {shown} needs one id for each row, but words= has {len(tokens)}")
        self.file = file
        options = {
            "method": TextualInversion.name,
            "tokens": [token for _, token in tokens],
            "words": [word for word, _ in tokens],
        }
        place = {"": [SavedSite(module_path=path)]}
        super().__init__(composed([options], [place], dtypes=file.dtypes.values(), target=[path]), file.path)

    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        (graft,) = surgeon.grafts
        return {f"{graft.key}.vectors": self.file.read([self.tensor])[self.tensor]}


def _file(path: Path) -> TensorFile:
    return TensorFile(only_file(path, TENSORS) or path / TENSORS)
