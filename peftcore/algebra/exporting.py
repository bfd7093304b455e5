"""Exports an adapter to another program: unchanged, as a LoRA that computes the same, or as the nearest LoRA.

`peftcore.files.readers` has rules for each program, which describe how the program reads a file. A file is checked by
these rules before it is written to its final path. So an adapter that the program would load with changes or only in
part is not written at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import nn

from peftcore.algebra.combining import Change, changes, lora_of, nearest
from peftcore.contract.batches import Data
from peftcore.contract.operators import Factors
from peftcore.errors import ExportError, MergeError, NotMergeable, NoWeights, UnsupportedSite
from peftcore.files.added_rows import check_no_rows
from peftcore.files.readers.check import ReaderReport, check
from peftcore.files.readers.reader import Reader
from peftcore.files.save_load import save
from peftcore.injection.injection import Injection
from peftcore.injection.request import host_map
from peftcore.injection.switching import activate
from peftcore.registry.plugins import layer_of
from peftcore.targets.resolver import Resolver
from peftcore.targets.sites import Site

How = Literal["as it is", "as a LoRA", "projected"]
NOTHING = 1e-6
"""An update counts as exact if its relative error is at most this."""


@dataclass(frozen=True)
class Export:
    """The result of `export`: how the adapter was written for a program."""

    how: How
    report: ReaderReport
    """The report on how the program reads the files, according to the rules for it."""
    rank: int
    """The rank of the LoRA; 0 if the adapter was written unchanged."""
    errors: dict[str, float]
    """The relative errors of the LoRA by site; empty if the adapter was written unchanged."""
    filled: tuple[str, ...] = ()
    """Modules that the adapter does not change, but that have an update of zero in the file. The program requires it:
    it reads updates of some modules only together with updates of these.
    """

    @property
    def error(self) -> float:
        """The largest of `errors`; 0 if `errors` is empty."""
        return max(self.errors.values(), default=0.0)


def export(
    injection: Injection,
    path: Path,
    reader: Reader,
    *,
    rank: int | None = None,
    data: Data | None = None,
    home: Path | None = None,
) -> Export:
    """Write an adapter so that another program applies all of it: unchanged, as an equal LoRA, or as the nearest LoRA.
    The model does not change.

    Args:
        path: the path of the folder to write, or of the file if the program's format is a single file.
        reader: the program, with the rules of how it reads files.
        rank: the rank of the nearest LoRA, which is written if the adapter is not a low-rank update. If `rank` is None,
            such an adapter raises ExportError.
        data: batches of inputs, with which the nearest LoRA is the one with the nearest outputs, as in `to_lora`.
        home: the path to which the caller will move the folder, if it is not `path`.

    Raises:
        ExportError: the program cannot read the adapter; the message has the reason. Nothing was written.
        NoWeights: the model is on the meta device, but its weights are needed to write the adapter as a LoRA.
        CalibrationError: `data` has no batches, or the model cannot be called with one.
    """
    try:
        return Export("as it is", as_it_is(injection, path, reader, home=home), 0, {})
    except ExportError as error:
        first = error
    if any(parameter.is_meta for parameter in injection.model.parameters()):
        raise NoWeights(f"{first}. To write it as a LoRA, load the model with its weights")
    with activate(injection.model, injection.name):
        try:
            made, kept, how, errors = _as_lora(injection, reader, rank, data)
            filled = _filled(injection.model, reader, made)
            lora = lora_of(injection.model, made | filled, f"{injection.name}_lora", [injection.name], kept)
            try:
                report = as_it_is(lora, path, reader, home=home)
            finally:
                lora.remove()
        except (MergeError, UnsupportedSite, ExportError) as error:
            instead = "serve it with peftcore" if isinstance(error, NotMergeable) else "merge it and serve the model"
            raise ExportError(
                f"{reader.name} does not read it as it is: {first}. It cannot be written as a LoRA: {error}. Instead, "
                f"{instead}"
            ) from None
    return Export(how, report, kept, errors, tuple(filled))


def as_it_is(injection: Injection, path: Path, reader: Reader, *, home: Path | None = None) -> ReaderReport:
    """Write an adapter unchanged in one of the program's formats, if the program then computes the same as peftcore.
    Returns the report on how the program reads it.

    Raises:
        ExportError: no format of the program can store the adapter, or the program would change, drop or reject a part
            of it. Nothing was written.
    """
    reasons = []
    for format in reader.writes:
        with TemporaryDirectory() as place:
            trial = Path(place) / "adapter"
            try:
                save(injection, trial, (format,), False, home=home or path)
            except ExportError as error:
                reasons.append(str(error))
                continue
            report = check(trial, reader)
        if report.as_trained:
            save(injection, path, (format,), False, home=home)
            return report
        reasons.insert(0, "; ".join(report.reasons[:4]))  # says more than that a format cannot hold it
    raise ExportError(reasons[0])


Updates = dict[str, tuple[Site, Factors]]


def _as_lora(
    injection: Injection, reader: Reader, rank: int | None, data: Data | None
) -> tuple[Updates, int, How, dict[str, float]]:
    """Returns an adapter as a LoRA: the updates by site path, the rank, whether it is exact or projected, and its
    errors.

    Raises:
        MergeError: the adapter does not change weights, or is merged.
        ExportError: the adapter changes more than a LoRA can, or its updates are not low-rank and `rank` is None.
    """
    if injection.trained_along:
        raise ExportError(
            f"{injection.trained_along[0]} was trained in addition (train=), and its change is not a low-rank update"
        )
    check_no_rows(injection, reader.name)
    most = reader.ranks.most if reader.ranks else None
    exact: Updates = {}
    for path, change in changes(injection).items():
        if change.is_vector:
            raise ExportError(f"vectors have no low-rank form, and the adapter changes {path}")
        factors = _lossless(change)
        if factors is None or (most is not None and factors[1].shape[-1] > most):
            break
        exact[path] = change.site, factors
    else:
        if not exact:
            raise ExportError("the adapter changes no weight")
        kept = max(1, *(factors[1].shape[-1] for _, factors in exact.values()))
        return exact, kept, "as a LoRA", dict.fromkeys(exact, 0.0)
    if rank is None:
        raise ExportError(
            f"the update at {path} is not low-rank; pass rank= (--project RANK) to write the nearest low-rank update, "
            "whose error is then reported"
        )
    made = nearest(injection, rank, data)
    updates = {path: (site, factors) for path, (site, factors, _) in made.items()}
    return updates, rank, "projected", {path: error for path, (_, _, error) in made.items()}


def _filled(model: nn.Module, reader: Reader, made: Updates) -> Updates:
    """Returns updates of rank 0 for modules that the adapter does not change, but that the program requires to have an
    update together with the changed modules.

    Raises:
        UnsupportedSite: one of these modules has no matrix.
    """
    resolver = Resolver(model, host_map(model), layer_of)
    found: Updates = {}
    for path in reader.lacking(made, resolver.modules):
        site = resolver.module_site(path)
        A = torch.empty(*site.batch, 0, site.in_features, *site.kernel)
        found[site.path] = site, (A, torch.empty(*site.batch, site.out_features, 0), 1.0)
    return found


def _lossless(change: Change) -> Factors | None:
    """Returns factors that equal a change. If the change already has factors, their rank is reduced to what its matrix
    can have. Otherwise the matrix is factored; the result is None if its rank is more than half of its smaller side."""
    matrix = change.delta.flatten(change.site.layer.batch_dims + 1)  # [*batch, out, in * kernel]
    kept = min(matrix.shape[-2:])
    if change.factors is None:
        values = torch.linalg.svdvals(matrix)
        lost = values.square().flip(-1).cumsum(-1).flip(-1).sqrt()  # [*batch, k]: what is left out with k columns
        most, kept = kept, int((lost > NOTHING * lost[..., :1]).sum(-1).max())
        if kept > most // 2:
            return None
    return change.nearest(max(kept, 1))[0]
