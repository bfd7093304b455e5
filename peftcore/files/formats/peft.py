"""Reads and writes folders of Hugging Face peft: ``adapter_config.json`` and ``adapter_model.safetensors``.

This module and `peft_writing` handle the parts that all adapter types of peft have in common: names of tensors,
targets, patterns, and modules that train with the adapter. A `PeftMethod` translates the options and tensors of one
type.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.contract.config import DTYPES
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import CheckpointError, shown
from peftcore.files.added_rows import AddedRows
from peftcore.files.envelope import Envelope
from peftcore.files.formats.composing import composed, literally
from peftcore.files.formats.description import Description, trouble, unique
from peftcore.files.formats.file_options import OFF, Keys
from peftcore.files.formats.file_tensors import Found
from peftcore.files.formats.format import Content, Files, Format, Placed, Tensors, held_by
from peftcore.files.formats.named_folders import named_folder, of_part
from peftcore.files.formats.peft_method import PeftMethod, peft_method
from peftcore.files.formats.peft_module_names import (
    Group,
    bare_names,
    check_targets,
    grouped_names,
    parameters_meant,
    sort_names,
    written_path,
    written_paths,
)
from peftcore.files.formats.peft_tying import kept_tied, one_update_for_several, untied_modules
from peftcore.files.formats.peft_writing import text_of, with_class, written, written_parts
from peftcore.files.formats.translated_operators import Place, places_of
from peftcore.files.safe_io import TensorFile, read_json
from peftcore.injection.injection import Injection
from peftcore.registry.plugins import layer_of
from peftcore.roles.token_tables import tables_by_path
from peftcore.surgery.table_rows import TableRows

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NEUTRAL = (
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "fan_in_fan_out", "runtime_config", "init_weights", "megatron_core",
)  # fmt: skip
"""Options that do not change the adapter's outputs: origin, initialization, and properties of the host's layers."""

TABLES = ("embed_tokens", "lm_head")
"""Names of the token tables that peft saves with the adapters of any model."""

COUNT = "num_batches_tracked"
"""The name of a norm's buffer that has no influence on the norm's outputs."""


class Peft(Format):
    """The format of peft's folders."""

    name = "peft"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        if not (path / CONFIG).is_file():
            return False
        try:
            return "peft_type" in read_json(path / CONFIG)
        except CheckpointError:
            return True

    def open(self, path: Path, model: nn.Module) -> Content:
        keys = Keys(read_json(path / CONFIG), path / CONFIG)
        keys.pass_over(*NEUTRAL)
        method = peft_method(keys.take("peft_type", str), keys.where)
        if not (path / TENSORS).exists():
            raise CheckpointError(f"{path} has no {TENSORS}; {held_by(path)}")
        file = TensorFile(path / TENSORS)
        return PeftContent(keys, file, bare_names(file, method.stem), method, model)

    def describe(self, path: Path) -> Description:
        options = read_json(path / CONFIG)
        keys = Keys(options, path / CONFIG)
        if not (path / TENSORS).exists():
            raise CheckpointError(f"{path} has no {TENSORS}; {held_by(path)}")
        about = described(self.name, keys, TensorFile(path / TENSORS))
        if about.problem:
            return about
        folders: dict[str, Path] = {}
        problem = trouble(lambda: folders.update(_named(peft_method(about.kind, keys.where), keys)))
        parts = [self.describe(folder) for folder in folders.values()]
        return replace(
            about,
            files=(*about.files, *(file for part in parts for file in part.files)),
            sites=unique(site for each in (about, *parts) for site in each.sites),
            problem=problem or next((part.problem for part in parts if part.problem), ""),
        )

    def options(self, path: Path) -> Mapping[str, Any]:
        return read_json(path / CONFIG)

    def files(self, injection: Injection, weights: bool = False) -> Files:
        options, tensors = written(injection)
        option, parts = written_parts(injection)
        options = with_class(options, injection.model)
        found: dict[str, str | Tensors | Placed] = {}
        for name, (own, values) in parts.items():
            found[f"{name}/{TENSORS}"] = Tensors(values, {"format": "pt"})
            found[f"{name}/{CONFIG}"] = text_of(with_class(own, injection.model))
        found[TENSORS] = Tensors(tensors, {"format": "pt"})
        if parts:  # peft looks up paths in the working directory
            found[CONFIG] = Placed(lambda folder: text_of({**options, option: {n: str(folder / n) for n in parts}}))
        else:
            found[CONFIG] = text_of(options)
        return found


def _named(method: PeftMethod, keys: Keys) -> dict[str, Path]:
    """Returns the folders of other adapters that an adapter's file lists, keyed by the name in the list.

    Raises:
        CheckpointError: a folder is missing, or contains no adapter of peft, or one of a type that `method` does not
            allow.
    """
    found = {}
    for name, path in method.named(keys).items():
        folder = named_folder(path, keys.where.parent, keys.where)
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{keys.where} names {folder}, which is not an adapter of peft; {held_by(folder)}")
        kind = read_json(folder / CONFIG).get("peft_type")
        if kind not in method.part_kinds:
            known = " and ".join(method.part_kinds)
            raise CheckpointError(f"{keys.where} names {folder}, which is {shown(kind)}, but has to be {known}")
        found[name] = folder
    return found


def described(name: str, keys: Keys, file: TensorFile, names: Mapping[str, str] | None = None) -> Description:
    """Returns the description of an adapter from its options and the names of its tensors, without a host.

    Args:
        name: the name of the format.
        names: as in `PeftContent`.
    """
    kind = keys.take("peft_type", str)
    about = Description(
        name,
        (file,),
        kind=kind,
        options={key: value for key, value in keys.data.items() if value not in OFF and key not in NEUTRAL},
        base=keys.take("base_model_name_or_path", str, ""),
        base_revision=keys.take("revision", str, ""),
        host=_class_of(keys),
        task=keys.take("task_type", str, ""),
    )
    if problem := trouble(lambda: peft_method(kind, keys.where)):
        return replace(about, problem=problem)
    method = peft_method(kind, keys.where)
    held = bare_names(file, method.stem) if names is None else names
    grouped, whole, rest = grouped_names(held, method.below, method.root)
    shapes = {key: file.shapes[full] for key, full in next(iter(grouped.values()), whole).items()}
    ours: list[str] = []
    problem = trouble(lambda: ours.append(method.options(keys, shapes)["method"]))
    return replace(
        about,
        methods=tuple(ours),
        sites=unique(path for path, _ in grouped),
        trained={path: file.shapes[full] for path, full in rest.items()},
        problem=problem,
    )


def _class_of(keys: Keys) -> str:
    """Returns the class of the base in peft's options; empty if they do not name it."""
    names = keys.table("auto_mapping")
    found = [names.get("parent_library"), names.get("base_model_class")]
    return ".".join(map(str, found)) if all(isinstance(each, str) for each in found) else ""


@dataclass
class PeftPart:
    """The part of a file that is read as one method of peftcore; nearly always the whole file."""

    method: PeftMethod
    keys: Keys
    groups: list[Group]
    prefix: str = ""
    config: dict[str, Any] = field(default_factory=dict)


class PeftContent(Content):
    """The content of a peft adapter for one host.

    Args:
        names: maps the name that peft itself would use for a tensor to its name in the file.
        exact: values of options that differ at some modules, keyed by the module's path in `names`.
    """

    def __init__(
        self,
        keys: Keys,
        file: TensorFile,
        names: Mapping[str, str],
        method: PeftMethod,
        model: nn.Module,
        exact: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.file, self.names, self.model, self.exact = file, names, model, exact or {}
        kinds = [(method, keys)]
        for name, data in method.companions(keys, model):
            kinds.append((peft_method(name, keys.where), Keys(data, keys.where)))
        below = [name for kind, _ in kinds for name in (*kind.below, *kind.beside.values())]
        root = [name for kind, _ in kinds for name in kind.root]
        self.sorted = sort_names(file, names, keys, below, root, model)
        paths = written_paths(self.sorted, model)
        self.parts, self.repeated = [], set[str]()
        for kind, of in kinds:
            meant = kind.meant(of, paths) if kind.below else None
            own = {*kind.below, *kind.beside.values()}
            groups = [group for group in self.sorted.groups if group.names.keys() & own]
            if of is not keys and meant is not None:
                groups = [group for group in groups if group.written in meant]
            every = {full for group in groups for full in group.names.values()}
            groups = kind.own(groups, model, lambda name: file.read([name])[name])
            self.repeated |= every - {full for group in groups for full in group.names.values()}
            check_targets(meant, parameters_meant(of, self.sorted, model), self.sorted, groups)
            self.parts.append(PeftPart(kind, of, groups))
        self.named = {name: Peft().open(each, model) for name, each in _named(method, keys).items()}
        for index, part in enumerate(self.parts):
            part.prefix = f"{index}/" if len(self.parts) > 1 else ""
            part.config = self._options(part)
        self._beside = {path: (part, g) for part in self.parts for g in part.groups
                        for path in part.method.trains(part.keys, g.path)}  # fmt: skip
        self._tables: dict[str, dict[str, str]] = {}
        self._check_buffers()
        trained = self._trained(keys, method)
        self._rows = self._rows_of_tables()
        held = {name: self._as_part(name, content) for name, content in self.named.items()}
        self.parts[0].config |= method.parts_options(keys, [each.config for each in held.values()])
        keys.check_known()
        groups = self.parts[0].groups
        selections = [part.method.selections(part.keys, [g.site for g in part.groups], model) for part in self.parts]
        selections[0] |= {
            f"{name}/{key}": sites for name, each in held.items() for key, sites in each.selections.items()
        }
        envelope = composed(
            [part.config for part in self.parts],
            selections,
            dtypes={*file.dtypes.values(), *(DTYPES[each.dtype] for each in held.values())},
            target=[group.path for group in groups] or None,
            train=(*trained, *self._beside),
            untied=self._untied,
            rows={path: (rows.start, rows.stop) for path, rows in self._rows.items()},
            host=keys.take("base_model_name_or_path", str, ""),
        )
        super().__init__(envelope, file.path)

    def _as_part(self, name: str, content: Content) -> Envelope:
        """Returns the envelope of another adapter that the file uses as a part.

        Raises:
            CheckpointError: the adapter also has values for other modules of the host, which a part cannot have.
        """
        held = content.envelope
        if beside := [*held.train, *held.rows]:
            raise CheckpointError(
                f"{content.where}: as the part {name} it cannot have values of other modules, such as {beside[0]}"
            )
        return held

    def _options(self, part: PeftPart) -> dict[str, Any]:
        """Returns the options of peftcore's method, with overrides for places at which a pattern changes options."""
        method, keys, groups = part.method, part.keys, part.groups
        names = self.sorted.root or (groups[0].names if groups else {})
        plain = method.options(keys, {name: self.file.shapes[full] for name, full in names.items()})
        changes = method.changes(keys, [group.key for group in groups])
        overrides = {}
        for group in groups:
            shapes = {name: self.file.shapes[full] for name, full in group.names.items()}
            here = method.options(
                keys.patched({**self.exact.get(group.written, {}), **changes.get(group.key, {})}), shapes
            )
            other = {name: value for name, value in here.items() if value != plain.get(name)}
            if other:
                overrides[literally(group.site_path)] = other
        return {**plain, "overrides": overrides} if overrides else plain

    def _trained(self, keys: Keys, method: PeftMethod) -> list[str]:
        """Returns the host's parameters that the adapter replaces according to its options. Other parameters in the
        file have to be equal to the host's. Token tables may differ, since peft saves them if rows were added."""
        ensured = bool(method.ties) and keys.take(method.ties, bool, False)
        announced, biases = keys.names("modules_to_save"), keys.take("bias", str, "none")
        found, owned = [], {group.path for part in self.parts for group in part.groups}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        copied: dict[str, str] = {}
        for path in self.sorted.replaced:
            if (module := self._copied(path, announced)) is not None:
                copied[path] = module
        tied = kept_tied(self.model, self.sorted.replaced, ensured and bool(copied))
        self._untied = untied_modules(self.model, copied, tied)
        if ensured:
            self.sorted.wrong[:0] = one_update_for_several(self.model, owned, method.ties)
        for path, full in self.sorted.replaced.items():
            owner, _, leaf = path.rpartition(".")
            bias = leaf == "bias" and (biases == "all" or (biases.endswith("_only") and owner in owned))
            if bias or path in copied or path in tied:
                found.append(path)
            elif self._is_table(owner):
                self._tables.setdefault(owner, {})[leaf] = full
            elif self.file.shapes[full] != parameters[path].shape or not torch.equal(
                self.file.read([full])[full].to(parameters[path]), parameters[path]
            ):
                self.sorted.wrong.append(f"{full} does not belong to the adapter and differs from the host's {path}")
        return found

    def _copied(self, path: str, names: Collection[str]) -> str | None:
        """Returns the path of the module with the parameter `path` that peft copied, since one of `names` is the end of
        the module's path; None if peft copied no such module."""
        written = written_path(path, self.sorted.move)
        ends = [f".{written}.".find(f".{name}.") + len(name) for name in names if f".{name}." in f".{written}."]
        if not ends:
            return None
        below = written[min(ends) :].strip(".")
        return path.removesuffix(below).removesuffix(".")

    def _check_buffers(self) -> None:
        """Record an error if a buffer in the file, such as a norm's statistics, differs from the host's."""
        for path, full in self.sorted.buffers.items():
            owner, _, leaf = path.rpartition(".")
            own = self.model.get_submodule(owner)._buffers[leaf]
            assert own is not None, "empty ones are none of the host's"
            self.repeated.add(full)
            same = own.is_meta or leaf == COUNT or torch.equal(self.file.read([full])[full].to(own), own)
            if not same:
                self.sorted.wrong.append(
                    f"{full} differs from the host's buffer {path}, and only parameters can be replaced"
                )

    def _is_table(self, path: str) -> bool:
        module = self.model.get_submodule(path)
        weight = module._parameters.get("weight")
        named = path in tables_by_path(self.model) or path.rpartition(".")[2] in TABLES
        return weight is not None and weight.dim() == 2 and (named or layer_of(module, "weight").one_hot)

    def _rows_of_tables(self) -> dict[str, AddedRows]:
        """Returns the rows in which token tables in the file differ from the host's, keyed by the table's path. If
        tables of the host are tied, all of them are returned."""
        found: dict[str, AddedRows] = {}
        for path, names in self._tables.items():
            held = {leaf: self.file.read([full])[full] for leaf, full in names.items()}
            own = {leaf: each for leaf, each in self.model.get_submodule(path)._parameters.items() if each is not None}
            rows = len(held.get("weight", ()))
            strange = [leaf for leaf in held if leaf not in own or held[leaf].shape != (rows, *own[leaf].shape[1:])]
            if strange or not rows:
                self.sorted.wrong.append(f"{names[(strange or list(names))[0]]} does not fit the host's {path}")
            elif rows != len(own["weight"]):
                self.sorted.wrong.append(
                    f"{names['weight']} has {rows} rows and the host's {path} {len(own['weight'])}: "
                    f"call model.resize_token_embeddings({rows}) first"
                )
            elif (start := min(_first_difference(held[leaf], own[leaf]) for leaf in held)) < rows:
                found[path] = AddedRows(start, rows, held["weight"], held.get("bias", own.get("bias")))
        weights = {id(self.model.get_submodule(path)._parameters["weight"]): each for path, each in found.items()}
        tied = {path: weights.get(id(module._parameters.get("weight"))) for path, module in self.model.named_modules()
                if not any(f"{path}.".startswith(f"{untied}.") for untied in self._untied)}  # fmt: skip
        return found | {path: each for path, each in tied.items() if each is not None and path not in found}

    def tensors(self, surgeon: Surgeon, strict: bool) -> dict[str, Tensor]:
        wrong, used = list(self.sorted.wrong), {*self.sorted.replaced.values(), *self.repeated}
        cache: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            if name not in cache:
                cache.update(self.file.read([name]))
            return cache[name]

        def found(names: Mapping[str, str]) -> Found:
            return Found(names, self.file.shapes, read, wrong, used)

        tensors: dict[str, Tensor] = {}
        whole = found(self.sorted.root)
        for part in self.parts:
            recorder = surgeon.parts[part.prefix[:-1]] if part.prefix else surgeon
            here = {group.path: found(group.names) for group in part.groups}
            selected = zip(recorder.selections.get("", ()), part.groups, strict=False)
            here |= {site.path: found(group.names) for site, group in selected}
            for place in places_of(recorder):
                names = here.get(place.site.path) or here.get(place.site.module_path) or whole
                part.method.check(place, CheckpointError, f"{self.where}: ")
                before = len(wrong)
                values = part.method.read(place, names)
                if len(wrong) == before:  # a place that lacks something stays as it is, where that is accepted
                    tensors |= {f"{place.graft.key}.{name}": value for name, value in values.items()}
            for name, shared in recorder.owned.items():
                values = part.method.read_shared(name, shared.module, whole)
                tensors |= {f"shared:{part.prefix}{name}.{key}": value for key, value in values.items()}
        for graft in surgeon.grafts:
            path, *others = [f"{each.module_path}.{each.tensor}".lstrip(".") for each in graft.holders]
            if isinstance(graft.operator, TableRows):
                rows = self._rows[graft.site.module_path]
                tensors[f"{graft.key}.value"] = rows.weight[rows.start :]
                if graft.operator.bias is not None and rows.bias is not None:
                    tensors[f"{graft.key}.bias"] = rows.bias[rows.start :]
            if not graft.trained_along:
                continue
            if path in self._beside:
                part, group = self._beside[path]
                place = Place(graft, 0, 1, surgeon.config)
                value = part.method.replaced(place, part.config, found(group.names))
            else:
                value = found({path: self.sorted.replaced[path]}).take(path, graft.operator.state_dict()["value"].shape)
                twins = [self.sorted.replaced[each] for each in others if each in self.sorted.replaced]
                wrong += [f"{each} differs from {path}, to which it is tied here" for each in twins
                          if not torch.equal(read(each).reshape(value.shape), value)]  # fmt: skip
            tensors[f"{graft.key}.value"] = value
        wrong += [f"unknown {name}" for name in sorted(set(self.names.values()) - used)]
        if strict and wrong:
            raise CheckpointError(f"{self.where}: {'; '.join(dict.fromkeys(wrong))}")
        for name, content in self.named.items():
            tensors |= of_part(content.tensors(surgeon.parts[name], strict), name, surgeon)
        return tensors


def _first_difference(held: Tensor, own: Tensor) -> int:
    """Returns the index of the first row in which two tensors differ; the number of rows if they are equal. Returns 0
    if `own` is on the meta device."""
    if own.is_meta:
        return 0
    other = (held.to(own) != own).flatten(1).any(1) if own.dim() > 1 else held.to(own) != own
    return int(other.int().argmax()) if other.any() else len(own)
