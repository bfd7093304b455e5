"""Translates tied token tables in peft's files. Peft trains a copy of each module in `modules_to_save`, so that each of
them has separate values, even if the host ties it to other modules. LoRA's option `ensure_weight_tying` keeps an
embedding and its heads tied."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from peftcore.contract.surgeon_protocol import Graft
from peftcore.errors import ExportError
from peftcore.roles.token_tables import token_tables

UNTIED = (
    "are tied and train as one tensor, of which peft would train separate copies. Save in peftcore's own format; or "
    "untie them before you adapt the model (tie_word_embeddings=False in a config of transformers)"
)


def holders_of(model: nn.Module) -> dict[int, list[str]]:
    """Returns all paths of each parameter of a host, keyed by the parameter's `id`."""
    found: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(path)
    return found


def kept_tied(model: nn.Module, held: Collection[str], ensured: bool) -> set[str]:
    """Returns the paths of tied parameters that stay tied: the file's options keep ties, and the file has values for
    all modules that share the parameter.

    Args:
        held: the paths of the parameters that the file has.
        ensured: True if the file's options keep ties.
    """
    groups = holders_of(model).values() if ensured else ()
    return {path for paths in groups if len(paths) > 1 and set(paths) <= set(held) for path in paths}


def one_update_for_several(model: nn.Module, paths: Collection[str], option: str) -> list[str]:
    """Returns an error if a file adapts several modules that are tied; otherwise an empty list. With options that keep
    ties, peft trains one update for all of these modules, and peftcore trains one for each.

    Args:
        paths: the modules that the file adapts.
        option: the name of the option that keeps ties.
    """
    for held in holders_of(model).values():
        tied = sorted({path.rpartition(".")[0] for path in held} & set(paths))
        if tied[1:]:
            return [
                f"with {option} peft trains one update for {' and '.join(tied)}, which are tied; peftcore trains one "
                f"for each: set {option} to false in the file's options, and name all of them in target_modules"
            ]
    return []


def untied_modules(model: nn.Module, copied: Mapping[str, str], tied: Collection[str]) -> tuple[str, ...]:
    """Returns the modules that have separate values in a file, although the host ties them to other modules.

    Args:
        copied: the parameters in the file, each with the module that peft copied.
        tied: the parameters that the file keeps tied.
    """
    by_path = {path: paths for paths in holders_of(model).values() for path in paths}
    found = {
        module
        for path, module in copied.items()
        if path not in tied and any(not f"{other}.".startswith(f"{module}.") for other in by_path[path])
    }
    return tuple(sorted(found))


def tying(
    model: nn.Module, grafts: Collection[Graft], ties: Mapping[str, tuple[str, ...]], option: str
) -> dict[str, Any]:
    """Returns the option of peft that keeps the trained parameters tied, with the value True; empty if none are tied.

    Args:
        grafts: the records of the trained parameters of modules.
        ties: the paths of other parameters that are tied to a trained one, keyed by the key of its record.
        option: the option of peft's type that keeps ties; empty if it has none.

    Raises:
        ExportError: peft would untie a parameter.
    """
    tied = [graft for graft in grafts if graft.key in ties]
    for graft in tied:
        others = {path.rpartition(".")[0] for path in ties[graft.key]}
        if not option or not _ties_again(model, {graft.site.module_path, *others}):
            raise ExportError(f"{', '.join([graft.key, *ties[graft.key]])} {UNTIED}")
    return {option: True} if tied else {}


def _ties_again(model: nn.Module, paths: set[str]) -> bool:
    """Whether peft's option ties these modules again. It does so for an embedding of a model of transformers and its
    heads without a bias, since peft makes a linear layer of each module that is tied to an embedding."""
    transformers, tables = sys.modules.get("transformers"), token_tables(model)
    if transformers is None or not isinstance(model, transformers.PreTrainedModel) or not tables:
        return False
    modules = {path: model.get_submodule(path) for path in paths}
    heads = {path for path, module in modules.items() if module is not tables[0]}
    known = {
        f"{path}.{name}".lstrip(".").rpartition(".")[0]
        for path, module in model.named_modules()
        if isinstance(module, transformers.PreTrainedModel)
        for name in module._tied_weights_keys or ()
    }
    plain = all(isinstance(modules[path], nn.Linear) and modules[path].bias is None for path in heads)
    return len(heads) == len(paths) - 1 and heads <= known and plain and model.config.tie_word_embeddings is not False
