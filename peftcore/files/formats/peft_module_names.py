"""Finds the host's modules for the tensor names in peft's files, and the modules that peft's options target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from peftcore.errors import CheckpointError
from peftcore.files.envelope import SavedSite
from peftcore.files.formats.file_options import Keys
from peftcore.files.formats.patterns import ending, matching
from peftcore.files.formats.rebasing import Move, find_move
from peftcore.files.safe_io import TensorFile

PREFIXES = ("base_model.model.", "base_model.")
"""Two prefixes of names in peft's files: for modules of the host, and for shared state of the adapter."""
WRAPPER = "base_layer"
"""The attribute under which peft's wrapper has the adapted module. If several parameters of a module are adapted, their
wrappers are nested."""

TOKENS = "token_adapter"
"""Peft's name for the module that wraps a token table, so that LoRA can train single tokens."""


@dataclass(frozen=True)
class Group:
    """The tensors of the file that belong to one module, or to one parameter of a module."""

    site: SavedSite
    """The site, as recorded in peftcore's own files."""
    written: str
    """The module's path in the file."""
    names: Mapping[str, str]
    """Full names of the tensors in the file, keyed by the part of the name below the module."""
    parameter: bool = False
    """True if peft's option `target_parameters` targets the parameter."""

    @property
    def path(self) -> str:
        """The module's path on the host."""
        return self.site.module_path

    @property
    def key(self) -> str:
        """The path that patterns of peft are matched with."""
        return f"{self.written}.{self.site.tensor}" if self.parameter else self.written

    @property
    def site_path(self) -> str:
        """The path that patterns of peftcore are matched with."""
        plain = self.site.tensor == "weight"
        return self.path if plain else f"{self.path}.{self.site.tensor}".lstrip(".")


@dataclass
class Sorted:
    """All tensors of a file, sorted by their modules."""

    groups: list[Group]
    root: dict[str, str]
    """Full names of tensors that belong to the whole adapter, keyed by their names without prefix."""
    replaced: dict[str, str]
    """Full names of tensors that replace a parameter of the host, keyed by the parameter's path."""
    wrong: list[str]
    move: Move
    buffers: dict[str, str]
    """Full names of tensors that are buffers of the host, such as a norm's statistics, keyed by the buffer's path."""


def bare_names(file: TensorFile, stem: str = PREFIXES[0]) -> dict[str, str]:
    """Returns the names of the tensors in a file of peft. The keys are the same names without peft's prefix.

    Args:
        stem: the prefix of the host's paths.

    Raises:
        CheckpointError: two tensors have one name.
    """
    return once(((_bare(full, stem), full) for full in file.shapes), file.path)


def once(pairs: Iterable[tuple[str, str]], where: Path) -> dict[str, str]:
    """Returns `pairs` of (translated name, name in the file) as a dictionary. Translated names have to be unique.

    Raises:
        CheckpointError: two tensors have one name.
    """
    found: dict[str, str] = {}
    for name, full in pairs:
        if name in found:
            raise CheckpointError(f"{where}: {found[name]} and {full} are the same tensor")
        found[name] = full
    return found


def _bare(name: str, stem: str) -> str:
    for prefix in (stem, PREFIXES[-1]):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


Grouped = tuple[dict[tuple[str, int], dict[str, str]], dict[str, str], dict[str, str]]


def grouped_names(names: Mapping[str, str], below: Iterable[str], root: Iterable[str]) -> Grouped:
    """Returns three mappings to the full names of tensors. The first is for tensors of modules: its keys are a module's
    path with the number of wrappers in it, then the part of the name below the module. The second is for tensors of the
    whole adapter, and the third for all others; both are keyed by name.

    The arguments are those of `sort_names`.
    """
    below, root = sorted(below, key=len, reverse=True), tuple(root)
    grouped: dict[tuple[str, int], dict[str, str]] = {}
    whole: dict[str, str] = {}
    rest: dict[str, str] = {}
    for name, full in names.items():
        if any(name == each or (each.endswith(".") and name.startswith(each)) for each in root):
            whole[name] = full
            continue
        leaf = next((each for each in below if f".{name}".endswith(f".{each}")), None)
        if leaf is None:
            rest[name] = full
            continue
        steps = name.removesuffix(leaf).strip(".").split(".")
        path = ".".join(step for step in steps if step != WRAPPER)
        grouped.setdefault((path, steps.count(WRAPPER)), {})[leaf] = full
    return grouped, whole, rest


def sort_names(
    file: TensorFile,
    names: Mapping[str, str],
    keys: Keys,
    below: Iterable[str],
    root: Iterable[str],
    model: nn.Module,
) -> Sorted:
    """Sort a file's tensors by the modules of the host.

    Args:
        names: maps the name that peft itself would use for a tensor to its name in the file.
        below: the names that tensors of modules can have below their module.
        root: the names of tensors that belong to the whole adapter.

    Raises:
        HostMismatch: the host lacks a module of the file.
    """
    modules = dict(model.named_modules())
    grouped, whole, rest = grouped_names(names, below, root)
    move = find_move((path for path, _ in grouped), modules, f"the adapter in {file.path}")
    meant = keys.names("target_parameters")
    groups = []
    for (path, depth), names in grouped.items():
        here = move(path)
        owner, _, last = here.rpartition(".")
        if last == "out_proj" and isinstance(modules.get(owner), nn.MultiheadAttention):  # it is never called itself
            site = SavedSite(module_path=owner, tensor="out_proj.weight")
            groups.append(Group(site, path.rpartition(".")[0], names))
            continue
        tensor = "in_proj_weight" if isinstance(modules[here], nn.MultiheadAttention) else "weight"
        tensors = [name for name in modules[here]._parameters if ending([f"{path}.{name}"], meant)]
        if depth < len(tensors):
            tensor = tensors[-1 - depth]  # the last one is wrapped last, so it stands outside
        site = SavedSite(module_path=here, tensor=tensor)
        groups.append(Group(site, path, names, depth < len(tensors)))
    order = {path: index for index, path in enumerate(modules)}
    groups.sort(key=lambda group: order[group.path])
    replaced, buffers, wrong = {}, {}, []
    for name, full in rest.items():
        plain = name.replace(f".{TOKENS}.{WRAPPER}.", ".")
        path = move(".".join(step for step in plain.split(".") if step != WRAPPER))
        owner, _, leaf = path.rpartition(".")
        if owner in modules and leaf in modules[owner]._parameters:
            replaced[path] = full
        elif owner in modules and modules[owner]._buffers.get(leaf) is not None:
            buffers[path] = full
        else:
            wrong.append(f"unknown {full}")
    return Sorted(groups, whole, replaced, wrong, move, buffers)


def written_path(path: str, move: Move) -> str:
    """Returns the path that a module or parameter of the host has in the file."""
    return f"{move.old}.{path}".strip(".") if move.old else path.removeprefix(move.new).removeprefix(".")


def written_paths(found: Sorted, model: nn.Module) -> list[str]:
    """Returns the paths that the host's modules would have in the file."""
    return [written_path(path, found.move) for path in dict(model.named_modules()) if path]


def check_targets(meant: set[str] | None, parameters: Iterable[str], found: Sorted, groups: Iterable[Group]) -> None:
    """Record an error for each module or parameter that the options target but that has no tensors in the file, and for
    each that has tensors but is not targeted.

    Peft adapts every place that the options target. A place without tensors in the file would keep its random initial
    values, so such a file is damaged.

    Args:
        meant: the modules that the options target; None if the options do not specify targets.
        parameters: the parameters that the options target.
    """
    for option, wanted, held in (
        ("target_parameters", set(parameters), {group.key for group in groups if group.parameter}),
        ("target_modules", meant, {group.written for group in groups if not group.parameter}),
    ):
        if wanted is not None:
            found.wrong += [f"missing tensors for {path}, which {option} matches" for path in sorted(wanted - held)]
            found.wrong += [
                f"unknown tensors for {path}, which {option} does not match" for path in sorted(held - wanted)
            ]


def parameters_meant(keys: Keys, found: Sorted, model: nn.Module) -> set[str]:
    """Returns the parameters of the host that peft's option `target_parameters` matches, as the paths that they would
    have in the file."""
    paths = [
        f"{written_path(path, found.move)}.{name}"
        for path, module in model.named_modules()
        for name in module._parameters
    ]
    return ending(paths, keys.names("target_parameters"))


def modules_meant(keys: Keys, paths: Iterable[str]) -> set[str] | None:
    """Returns the modules that the options target; None if the options do not specify targets."""
    target = keys.take("target_modules", (list, str), None)
    only, lists = keys.take("layers_to_transform", (list, int), None), keys.names("layers_pattern")
    exclude = keys.take("exclude_modules", (list, str), None)
    if target is None or target == "all-linear":
        return None
    if isinstance(target, str):
        meant = matching(target, paths, keys.where)
    else:
        meant = ending(paths, keys.names("target_modules"))
        if only is not None and only != []:
            chosen = {only} if isinstance(only, int) else set(only)
            meant = {path for path in meant if _layer(path, lists, keys) in chosen}
    if isinstance(exclude, str):
        meant -= matching(exclude, meant, keys.where)
    elif exclude:
        meant -= ending(meant, keys.names("exclude_modules"))
    saved = keys.names("modules_to_save")
    return {path for path in meant if not any(f".{name}." in f".{path}." for name in saved)}


def _layer(path: str, lists: list[str], keys: Keys) -> int | None:
    """Returns the index of the layer that contains a module: the first number in the path after one of `lists`, or if
    `lists` is empty, after any two names. None if there is no such number."""
    steps = path.split(".")
    for index in range(1, len(steps)):
        inside = index + 1 < len(steps) and steps[index].isdecimal()
        holder = "." + ".".join(steps[:index])
        if inside and (index > 1 if not lists else any(holder.endswith(f".{name}") for name in lists)):
            return int(steps[index])
    return None
