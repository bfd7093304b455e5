"""Rows that were added to token tables of the base, for example by ``resize_token_embeddings``. A fresh copy of the
base lacks these rows, so the adapter's file has them, even though they were not trained."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import ExportError
from peftcore.files.envelope import base_name, base_revision
from peftcore.injection.injection import Injection
from peftcore.layers.pieces import whole
from peftcore.roles.token_tables import tables_by_path, token_count
from peftcore.surgery.table_rows import TableRows


@dataclass(frozen=True)
class AddedRows:
    """The rows that were added to one token table, from `start` up to but excluding `stop`."""

    start: int
    stop: int
    weight: Tensor
    """The whole table, including the added rows, ``[tokens, width]``."""
    bias: Tensor | None
    """The whole bias of an output head, including the added rows, ``[tokens]``; None if there is no bias."""

    def copy(self) -> AddedRows:
        """Returns a copy with its own tensors."""
        return replace(self, weight=self.weight.clone(), bias=None if self.bias is None else self.bias.clone())


@torch.no_grad()
def added_rows(injection: Injection) -> dict[str, AddedRows]:
    """Returns the rows of token tables that the original base of an injection lacks, keyed by the table's path. They
    were loaded with the injection, or added later. Tables that are trained as a whole are omitted, since all of their
    rows are saved anyway.

    Raises:
        MergeError: the injection is merged into a table, and the table's original values were not kept.
    """
    found = _found(injection)
    changed = {site.module_path for graft in injection.grafts for site in graft.holders} if injection.merged else set()
    if changed.isdisjoint(found):
        return found
    with injection.disabled():
        return {path: rows.copy() for path, rows in _found(injection).items()}


def _found(injection: Injection) -> dict[str, AddedRows]:
    found: dict[str, AddedRows] = {}
    for graft in injection.grafts:
        if isinstance(graft.operator, TableRows):
            module, operator = graft.site.module, graft.operator
            weight = operator.merged(whole(module._parameters["weight"]))  # type: ignore[arg-type]
            bias = operator.merged_bias(_bias(module), lambda: weight)  # noqa: B023
            found[graft.site.module_path] = AddedRows(operator.start, len(weight), weight, bias)
    model, stop = injection.model, token_count(injection.model)
    if not 0 < (start := _rows_of_base(injection)) < stop:
        return found
    trained = {site.module_path for graft in injection.grafts if graft.trained_along for site in graft.holders}
    for path, module in tables_by_path(model).items():
        if path not in trained and path not in found:
            weight = whole(module._parameters["weight"])  # type: ignore[arg-type]
            found[path] = AddedRows(start, stop, weight.detach(), _bias(module))
    return found


def _bias(module: nn.Module) -> Tensor | None:
    bias = module._parameters.get("bias")
    return None if bias is None else whole(bias).detach()


def _rows_of_base(injection: Injection) -> int:
    """Returns the number of rows of the base's token tables: from the base's config file if it is available locally,
    otherwise the number at the time when the first adapter was installed."""
    config: Any = vars(injection.model).get("config")
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(config, transformers.PretrainedConfig):
        folder = _origin(base_name(injection.model), base_revision(injection.model))
        if folder is not None:
            now, then = (
                getattr(each.get_text_config(), "vocab_size", None) for each in (config, _read(config, folder))
            )
            if now is not None and then is not None:
                return token_count(injection.model) - int(now - then)
    return injection.state.tokens


def _read(config: Any, folder: Path) -> Any:
    try:
        return type(config).from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError):
        return config


def _origin(name: str | None, commit: str | None) -> Path | None:
    """Returns the folder that contains the config of a base: a local folder, or one in the hub's cache; None if there
    is neither. Nothing is downloaded."""
    if not name:
        return None
    if (Path(name) / "config.json").is_file():
        return Path(name)
    hub = sys.modules.get("huggingface_hub")
    if hub is None:
        return None
    try:
        cached = hub.try_to_load_from_cache(name, "config.json", revision=commit)
    except ValueError:  # no name of a repository
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def spans(rows: Mapping[str, AddedRows]) -> dict[str, tuple[int, int]]:
    """Returns the range (first, last + 1) of the added rows of each table, keyed by the table's path and sorted."""
    return {path: (rows[path].start, rows[path].stop) for path in sorted(rows)}


def check_no_rows(injection: Injection, format: str, held: Mapping[str, Collection[int]] = {}) -> None:
    """Raise an error if a file in this format would lack rows that were added to the base.

    Args:
        held: the rows that the file has, keyed by the table's path.

    Raises:
        ExportError: rows were added to tables of the base, and the format cannot hold them.
    """
    for path, rows in added_rows(injection).items():
        lacking = set(range(rows.start, rows.stop)).difference(held.get(path, ()))
        if not lacking:
            continue
        raise ExportError(
            f"{len(lacking)} rows were added to {path}, which {format} files cannot hold: save the base with them by "
            "model.save_pretrained(folder), and set model.config._name_or_path to that folder"
        )
