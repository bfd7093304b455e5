"""Reads and writes files of kohya's sd-scripts, of LyCORIS and for ComfyUI: one safetensors file for a model or a
pipeline.

A name such as ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`` has three parts: the model, the
module's path with underscores instead of dots, and the tensor. To find which underscores replace dots, names are
compared with the host's modules, or with their names in the original code (`original_names`). Files have no options:
the rank and the variant follow from shapes, and each module has an ``alpha``, so that its scale is alpha / rank. The
one exception is dropout: the header can contain the dropouts that were used in training. A `KohyaMethod` translates the
tensors of a method; the plugin of the method registers it under ``"kohya/NAME"``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.contract.surgeon_protocol import Graft
from peftcore.errors import ExportError
from peftcore.files.added_rows import check_no_rows
from peftcore.files.formats.bundled_embeddings import (
    bundled,
    counts,
    is_word,
)
from peftcore.files.formats.description import Description, unique
from peftcore.files.formats.format import Content, Files, Format, Tensors
from peftcore.files.formats.kohya_method import (
    ALPHA,
    VECTORS,
    KohyaMethod,
    Piece,
    kohya_methods,
    method_of,
)
from peftcore.files.formats.kohya_names import DIFFUSION, PARTS, are_known, part_of, stem_of, understood
from peftcore.files.formats.kohya_reading import ARGUMENTS, KohyaContent
from peftcore.files.formats.kohya_spelling import Spelling
from peftcore.files.formats.original_names import OriginalModule, is_transformer, original_names, written_names
from peftcore.files.formats.pipelines import (
    clip_prefix,
    is_text_encoder,
    is_unet,
    names_in,
    only_file,
)
from peftcore.files.formats.translated_operators import Place
from peftcore.files.safe_io import TensorFile
from peftcore.injection.injection import Injection
from peftcore.registry.plugins import layer_of

TENSORS = "kohya.safetensors"
"""The name of the file that `save` writes into a folder. When reading, any name is accepted if it is the only file."""
UNET, OURS = "lora_unet", "lycoris"
"""Two prefixes of tensor names. The first is for diffusion models: their modules have the names of the original code,
if these are known. The second is for any model: modules have the host's own names."""


class Kohya(Format):
    """The format of files of kohya's sd-scripts and of LyCORIS, and of files for ComfyUI."""

    name = "kohya"
    file = TENSORS
    parts: ClassVar[tuple[str, ...]] = (*PARTS, DIFFUSION)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return are_known(names_in(only_file(path, TENSORS)))

    def open(self, path: Path, model: nn.Module) -> Content:
        return self.open_with_words(path, model, {})

    def open_with_words(self, path: Path, model: nn.Module, words: Mapping[str, Sequence[int]]) -> Content:
        return KohyaContent(TensorFile(only_file(path, TENSORS) or path / TENSORS), model, words)

    def describe(self, path: Path) -> Description:
        file = TensorFile(only_file(path, TENSORS) or path / TENSORS)
        stems: dict[str, dict[str, Size]] = {}
        for full, shape in file.shapes.items():
            if is_word(full):
                continue
            said = understood(full, part_of(full) or "")
            stems.setdefault(said.stem, {})[said.leaf] = shape
        known = kohya_methods()
        found = {stem: method_of(known, shapes) for stem, shapes in stems.items()}
        strange = [stem for stem, method in found.items() if method is None]
        return Description(
            self.name,
            (file,),
            methods=unique(method.methods[0] for method in found.values() if method is not None),
            parts=unique(part for full in file.shapes if (part := part_of(full))),
            sites=tuple(stems),
            words=counts(file.shapes),
            problem=f"no installed plugin reads the tensors at {', '.join(strange[:4])}" if strange else "",
        )

    def files(self, injection: Injection, weights: bool = False) -> Files:
        if injection.shared:
            raise ExportError(
                f"kohya files hold tensors of modules, not shared ones such as {next(iter(injection.shared))!r}"
            )
        part = self.part or _guessed(injection.model)
        if part == "oft_unet":
            raise ExportError(
                "peftcore only reads oft_unet, of sd-scripts' networks/oft.py; write lora_unet, for LyCORIS"
            )
        modules = dict(injection.model.named_modules())
        spelling = Spelling(modules)
        methods, noted = kohya_methods(), set[str]()
        held: dict[str, tuple[KohyaMethod, Piece]] = {}
        standing: dict[str, tuple[str, set[str]]] = {}
        words: dict[str, Tensor] = {}
        rows: dict[str, list[int]] = {}
        for index, graft in enumerate(injection.grafts):
            site, owner = graft.site, injection.owner(graft)
            if graft.trained_along:
                continue
            able = [each for each in methods if owner.method.name in each.methods]
            if not able:
                raise ExportError(f"kohya files have no method that computes the same as {owner.method.name}")
            place = Place(graft, index, len(injection.grafts), owner.config.at(site.path))
            method = next((each for each in able if each.writes(place)), able[-1])
            if tokens := method.tokens(place):
                bundle = bundled(part, tokens, method.write(place)[1][VECTORS])
                if not words.keys().isdisjoint(bundle):
                    raise ExportError(f"two tables have the words {', '.join(bundle)}, and kohya files hold only one")
                words |= bundle
                rows |= {each.module_path: [index for _, index in tokens] for each in graft.holders}
                continue
            one_hot = layer_of(site.module, "weight").one_hot
            if site.tensor not in method.tensors or site.slices is not None or site.batch or one_hot:
                raise ExportError(
                    f"kohya files hold only whole linear layers, convolutions and norms, not {site.path}; exclude it"
                )
            spelling.only(site.module_path)
            first, taken = standing.setdefault(site.module_path, (graft.part, set()))
            if first != graft.part or site.tensor in taken:
                raise ExportError(f"kohya files hold one operator for each module, and {site.path} has two")
            taken.add(site.tensor)
            if method.dropouts:
                noted.add(json.dumps({n: str(v) for n in method.dropouts if (v := getattr(place.config, n))}))
            alpha, values = method.write(place)
            before = held[site.module_path][1].tensors if site.module_path in held else {}
            held[site.module_path] = method, Piece(alpha, {**before, **values})
        for graft in injection.grafts:
            if graft.trained_along:
                _add(held, graft)
        check_no_rows(injection, "kohya", rows)
        if len(noted) > 1:
            raise ExportError("kohya files hold the same dropouts for all modules, and this adapter has different ones")
        (said,) = noted or {"{}"}
        front, tensors = clip_prefix(injection.model) if part.startswith("lora_te") else "", dict(words)
        original = part == DIFFUSION or (part == UNET and not is_unet(injection.model))
        for path, piece in _named(held, modules, original_names(modules) if original else {}).items():
            stem = stem_of(part, front + path)
            if piece.alpha is not None:
                tensors[f"{stem}.{ALPHA}"] = torch.tensor(float(piece.alpha), dtype=torch.float32)
            tensors |= {f"{stem}.{name}": value.detach().contiguous() for name, value in piece.tensors.items()}
        return {TENSORS: Tensors(tensors, {"format": "pt"} if said == "{}" else {ARGUMENTS: said})}


def _guessed(model: nn.Module) -> str:
    """Returns the prefix of tensor names for a host."""
    if is_unet(model) or is_transformer([path for path, _ in model.named_modules()]):
        return UNET
    return "lora_te" if is_text_encoder(model) else OURS


def _add(held: dict[str, tuple[KohyaMethod, Piece]], graft: Graft) -> None:
    """Add the change of a host's tensor that was trained with the adapter to the tensors of its module.

    Raises:
        ExportError: kohya files cannot store this tensor.
    """
    site = graft.site
    method, piece = held.get(site.module_path, (None, Piece(None, {})))
    name = next((leaf for leaf, tensor in method.beside.items() if tensor == site.tensor), None) if method else None
    if method is None or name is None:
        raise ExportError(
            f"kohya files cannot hold {site.path}, which trains with the adapter: they hold only biases of modules "
            "that have a LoRA"
        )
    value: Tensor = graft.operator.state_dict()["value"]
    change = value - replace(site, meta=False).base_weight().detach().to(value)
    held[site.module_path] = method, Piece(piece.alpha, {**piece.tensors, name: change})


def _named(
    held: Mapping[str, tuple[KohyaMethod, Piece]],
    modules: Mapping[str, nn.Module],
    originals: Mapping[str, OriginalModule],
) -> dict[str, Piece]:
    """Returns the tensors to write, keyed by the modules' names in the original code. If several modules of the host
    are one module of the original code, their tensors are combined.

    Raises:
        ExportError: the modules cannot be combined.
    """
    theirs, found = written_names(originals), dict[str, Piece]()
    for name in dict.fromkeys(theirs.get(path, path) for path in held):
        original = originals.get(name, OriginalModule((name,)))
        pieces = [held.get(path) for path in original.paths]
        method, piece = next(each for each in pieces if each is not None)
        if not original.whole:
            if any(each is not None and each[0] is not method for each in pieces):
                raise ExportError(_not_one(name, original, "they have different methods"))
            sizes = [layer_of(modules[path], "weight").shape(modules[path], "weight")[0] for path in original.paths]
            try:
                piece = method.joined([None if each is None else each[1] for each in pieces], sizes)
                piece = method.swapped(piece) if original.swapped else piece
            except ExportError as error:
                raise ExportError(_not_one(name, original, str(error))) from None
        found[name] = piece
    return found


def _not_one(name: str, original: OriginalModule, why: str) -> str:
    return (
        f"{', '.join(original.paths)} cannot be written as {name}: {why}; "
        f'format="kohya/{OURS}" keeps the modules of the host'
    )
