"""Checks an adapter's file for a program: which parts the program would read, change, drop or refuse, without a
model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Size

from peftcore.errors import CheckpointError
from peftcore.files.formats.file_options import OFF
from peftcore.files.formats.format import recognize
from peftcore.files.readers.reader import BLOCK, Reader, Verdict

TYPE = "peft_type"
MADE = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "velora_config", "init_weights",
)  # fmt: skip
"""Options of peft that do not change how an adapter's tensors are used: its targets, which the tensors' names show too,
and how it was initialized and trained."""
FILLS = "; peftcore export adapts {} too, by an update of zero"
RANKS = ("lora_A.weight", "lora_embedding_A", "lora_down.weight", "lora.down.weight")
"""Suffixes of the names of tensors ``[rank, ...]``."""


@dataclass(frozen=True)
class ReaderReportRow:
    """One part of a file, and how the program treats it."""

    what: str
    """The name of an option or a tensor, or of a module whose tensors are read."""
    verdict: Verdict
    why: str = ""
    tensors: tuple[str, ...] = ()
    """The names of the tensors; empty for an option, or for the file as a whole."""


@dataclass(frozen=True)
class ReaderReport:
    """The result of `check`: the verdict of a program on each part of one file."""

    reader: Reader
    format: str
    rows: tuple[ReaderReportRow, ...]
    needs: str = ""
    """The flag with which the program has to be started; empty if it needs none."""

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all parts."""
        order = list(Verdict)
        return max((row.verdict for row in self.rows), key=order.index, default=Verdict.READ)

    @property
    def as_trained(self) -> bool:
        """True if the program reads the whole file as it was trained."""
        return self.verdict is Verdict.READ

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons why the file is not read as it was trained, each once."""
        found: dict[tuple[Verdict, str], list[str]] = {}
        for row in self.rows:
            if row.verdict is not Verdict.READ:
                found.setdefault((row.verdict, row.why), []).append(row.what)
        return tuple(
            f"{parts[0]}{f' and {len(parts) - 1} more' if len(parts) > 1 else ''}: {verdict}, {why}"
            for (verdict, why), parts in found.items()
        )


@dataclass(frozen=True)
class _File:
    format: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Size]
    made: bool
    """Whether peftcore only writes this format, so that the file was exported from another adapter."""


def check(path: str | Path, reader: Reader) -> ReaderReport:
    """Returns what a program does with each option and tensor of an adapter, without a model.

    Raises:
        CheckpointError: the file is not an adapter in a known format, or is damaged.
    """
    file = _opened(Path(path))
    if file.format not in reader.formats:
        known = " and ".join(reader.formats)
        of = " from the original adapter" * file.made
        why = f"{reader.name} reads files of {known}: peftcore export writes one{of}"
        return ReaderReport(
            reader, file.format, (ReaderReportRow(f"format {file.format}", Verdict.REFUSED, why, tuple(file.tensors)),)
        )
    kind = file.options.get(TYPE)
    if kind is not None and kind not in reader.types:
        rule = reader.more_types.get(kind, reader.other_types)
        return ReaderReport(
            reader, file.format, (ReaderReportRow(f"{TYPE} {kind}", rule.verdict, rule.why, tuple(file.tensors)),)
        )
    rows = [*_options(file.options, reader), *_tensors(file, reader)]
    modules = {row.what: row.tensors for row in rows if row.tensors and row.verdict is Verdict.READ}
    rows += [*_alone(modules, reader), *_in_some_blocks(modules, reader)]
    rank = _rank(file)
    if reader.ranks is not None and rank > reader.ranks.most:
        why = f"{reader.name} reads at most {reader.ranks.most}: peftcore export --project writes a lower rank"
        rows.append(ReaderReportRow(f"rank {rank}", Verdict.REFUSED, why))
        return ReaderReport(reader, file.format, tuple(rows))
    return ReaderReport(reader, file.format, tuple(rows), reader.ranks.needed(rank) if reader.ranks else "")


def _opened(path: Path) -> _File:
    format = recognize(path)
    about = format.describe(path)
    if not about.files:
        raise CheckpointError(f"{path} has no tensors")
    tensors = {name: shape for file in about.files for name, shape in file.shapes.items()}
    return _File(format.name, format.options(path), tensors, bool(about.problem))


def _options(options: Mapping[str, Any], reader: Reader) -> Iterator[ReaderReportRow]:
    for name, value in options.items():
        if name == TYPE or name in MADE or value in OFF:
            continue
        rule = reader.options.get(name, reader.other_options)
        read = any(value is each or (value == each and type(value) is type(each)) for each in rule.but)
        yield ReaderReportRow(f"option {name}", Verdict.READ if read else rule.verdict, "" if read else rule.why)


def _tensors(file: _File, reader: Reader) -> Iterator[ReaderReportRow]:
    found: dict[tuple[str, Verdict, str], list[str]] = {}
    for name, shape in file.tensors.items():
        module, rule = reader.tensor(name, shape, file.format)
        what = module if rule.verdict is Verdict.READ else name
        found.setdefault((what, rule.verdict, rule.why), []).append(name)
    for (what, verdict, why), names in found.items():
        yield ReaderReportRow(what, verdict, why, tuple(names))


def _alone(modules: Mapping[str, tuple[str, ...]], reader: Reader) -> Iterator[ReaderReportRow]:
    """Yields a row for each module that the program reads only together with another module, if the other module is not
    adapted."""
    for rule in reader.beside:
        for path, names in modules.items():
            other = rule.other(path)
            if other is not None and other not in modules:
                why = rule.rule.why + FILLS.format(rule.wants) * rule.filled
                yield ReaderReportRow(f"{path} without {rule.wants}", rule.rule.verdict, why, names)


def _in_some_blocks(modules: Mapping[str, tuple[str, ...]], reader: Reader) -> Iterator[ReaderReportRow]:
    """Yields a row for each module that is adapted in only some blocks, if the program requires all blocks."""
    if reader.some_blocks is None:
        return
    kinds: dict[str, dict[int, str]] = {}
    for path in modules:
        if found := BLOCK.search(path):
            kinds.setdefault(found["rest"], {})[int(found["index"])] = path
    rule, filled = reader.some_blocks.rule, reader.some_blocks.filled
    last = max((index for held in kinds.values() for index in held), default=-1)
    for held in kinds.values():
        if len(held) <= last:
            for path in held.values():
                yield ReaderReportRow(
                    path, rule.verdict, rule.why + FILLS.format("it in the others") * filled, modules[path]
                )


def _rank(file: _File) -> int:
    """Returns the largest rank in a file's options and tensors; 0 if there is none."""
    said = [file.options.get("r"), *_values(file.options.get("rank_pattern"))]
    seen = [shape[0] for name, shape in file.tensors.items() if name.endswith(RANKS) and shape]
    return max([*seen, *(each for each in said if isinstance(each, int))], default=0)


def _values(table: Any) -> Iterable[Any]:
    return table.values() if isinstance(table, dict) else ()
