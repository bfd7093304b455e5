"""New words in one file with the adapters of a pipeline: ``bundle_emb.<word>.clip_l`` has the word's embedding vectors,
``[vectors, width]``, for the token embedding of one text encoder.

AUTOMATIC1111's webui, LyCORIS and OneTrainer write such files. A file contains no token ids: the caller of `load`
passes the ids of each word in the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn

from peftcore.errors import CheckpointError, ExportError, HostMismatch
from peftcore.files.safe_io import TensorFile
from peftcore.roles.token_tables import tables_by_path

FRONT = "bundle_emb."
ANY = "string_to_param.*"
"""The encoder's name in files of pipelines with only one text encoder."""
ENCODERS: Mapping[str, tuple[str, ...]] = {
    "clip_l": ("lora_te", "lora_te1", "text_encoders.clip_l.transformer"),
    "clip_g": ("lora_te2", "text_encoders.clip_g.transformer"),
    "t5": ("lora_te3", "text_encoders.t5xxl.transformer"),
    ANY: ("lora_te",),
}
"""Maps the last part of a tensor's name to the prefixes of the models for which the tensor has vectors."""
OUTPUTS = "_out"
"""The suffix of vectors that OneTrainer inserts into the output of an encoder instead of its input."""
PICTURES = frozenset({"lora_unet", "lora_transformer", "oft_unet", "diffusion_model"})
"""Prefixes of models without a tokenizer."""


def is_word(name: str) -> bool:
    """True if the tensor of this name has the vectors of a word."""
    return name.startswith(FRONT)


def taken_apart(name: str) -> tuple[str, str]:
    """Returns the word and the name of the encoder from a tensor's name, such as ``("cat", "clip_l")``."""
    word, _, kind = name.removeprefix(FRONT).partition(".")
    return word, kind


def is_known(name: str) -> bool:
    """True if the tensor's name ends with the name of a known encoder."""
    kind = taken_apart(name)[1]
    return kind in ENCODERS or kind.removesuffix(OUTPUTS) in ENCODERS


def counts(shapes: Mapping[str, Size]) -> dict[str, int]:
    """Returns the number of vectors of each word in a file; the maximum, if it differs between encoders."""
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        if is_word(name):
            word = taken_apart(name)[0]
            found[word] = max(found.get(word, 0), shape[0] if len(shape) > 1 else 1)
    return found


@dataclass(frozen=True)
class Read:
    """The words that were read from a file for the token embedding of a host."""

    path: str
    """The path of the token embedding."""
    vectors: Tensor
    """All vectors, ``[vectors, width]``."""
    tokens: tuple[tuple[str, int], ...]
    """The word and the token id for each vector."""
    names: frozenset[str]
    """The names of the tensors in the file from which the vectors were read."""


def only_table(model: nn.Module, file: TensorFile) -> tuple[str, int]:
    """Returns the path and the width of the host's only token embedding.

    Raises:
        HostMismatch: the host has no token embedding, or several with different weights.
    """
    tables = tables_by_path(model)
    if not tables:
        raise HostMismatch(f"{file.path}: words= needs a text encoder, and this host has no token embedding")
    if len({id(each.get_parameter("weight")) for each in tables.values()}) > 1:
        raise HostMismatch(
            f"{file.path}: words= needs a host with one token embedding, this one has {', '.join(tables)}"
        )
    path, table = next(iter(tables.items()))
    return path, table.get_parameter("weight").shape[1]


def read_words(file: TensorFile, model: nn.Module, ids: Mapping[str, Sequence[int]], part: str) -> Read:
    """Returns the vectors of the words in `ids`, read from a file.

    Args:
        ids: the token ids of each word, one for each of its vectors.
        part: the name of the host in files; empty if the file contains no adapter for the host, so that the name is
            unknown.

    Raises:
        CheckpointError: the file lacks a word, or has another number of vectors for it.
        HostMismatch: the file has no vectors for this host, or vectors for several encoders that fit it.
    """
    path, width = only_table(model, file)
    some = any(part in parts for parts in ENCODERS.values())
    held: dict[str, dict[str, str]] = {}
    for name in filter(is_word, file.shapes):
        word, kind = taken_apart(name)
        if kind in ENCODERS and (not some or part in ENCODERS[kind] or kind == ANY):
            held.setdefault(word, {})[kind] = name
    known = counts(file.shapes)
    if strange := [word for word in ids if word not in known]:
        raise CheckpointError(f"{file.path} has no word {strange[0]!r}; it has: {', '.join(known) or 'none'}")
    names, tokens = [], list[tuple[str, int]]()
    for word, own in ids.items():
        fitting = [name for name in held.get(word, {}).values() if file.shapes[name][-1:] == (width,)]
        if not fitting:
            shown = ", ".join(f"{name} {tuple(file.shapes[name])}" for name in file.shapes if is_word(name))
            raise HostMismatch(f"{file.path}: no vectors of {word!r} have the width {width} of {path}; it has {shown}")
        if len(fitting) > 1:
            raise HostMismatch(f"{file.path}: {' and '.join(fitting)} all fit {path}; put each in a separate file")
        shape = file.shapes[fitting[0]]
        count = shape[0] if len(shape) == 2 else 1
        if len(shape) > 2 or len(own) != count:
            raise CheckpointError(
                f"{file.path}: {fitting[0]} has shape {tuple(shape)}: words= needs one id for each vector, and has "
                f"{len(own)} for {word!r}"
            )
        names += fitting
        tokens += [(word, int(each)) for each in own]
    values = file.read(names)
    vectors = torch.cat([values[name].reshape(-1, width) for name in names])
    return Read(path, vectors, tuple(tokens), frozenset(names))


def bundled(part: str, tokens: Iterable[tuple[str, int]], vectors: Tensor) -> dict[str, Tensor]:
    """Returns the tensors to write for words, keyed by their names in the file.

    Args:
        part: the name of the host in files.
        tokens: the word and the token id for each vector.
        vectors: all vectors, ``[vectors, width]``.

    Raises:
        ExportError: such files hold no words for this model, or the name of a word is empty or has a dot.
    """
    kind = next((kind for kind in (ANY, *ENCODERS) if part in ENCODERS[kind]), None)
    if kind is None:
        named = ", ".join(dict.fromkeys(f'"kohya/{each[0]}"' for each in ENCODERS.values()))
        raise ExportError(f"kohya files hold words of text encoders, not of {part!r}; use one of the formats {named}")
    rows: dict[str, list[int]] = {}
    for row, (word, _) in enumerate(tokens):
        rows.setdefault(word, []).append(row)
    for word in rows:
        if not word or "." in word:
            raise ExportError(
                f"{word!r} cannot name a word in a kohya file: a name is not empty and has no dot; rename it"
            )
    return {f"{FRONT}{word}.{kind}": vectors.detach()[own].contiguous() for word, own in rows.items()}
