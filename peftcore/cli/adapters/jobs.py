"""The work of the commands on adapter files: merge, convert, and export as a LoRA or for a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import transformers

import peftcore
from peftcore.algebra.exporting import Export, as_it_is
from peftcore.algebra.exporting import export as algebra_export
from peftcore.cli.adapters.adapter_hosts import (
    AdapterFile,
    ModelOptions,
    ModelSource,
    check_complete,
    find_source,
    write,
)
from peftcore.cli.adapters.output import AdapterOutput
from peftcore.cli.adapters.results import Converted, Exported, ForReader, MergedAdapter, shown_format
from peftcore.errors import BadInput, CheckpointError, ExportError, NotMergeable, NoWeights
from peftcore.files.formats.format import recognize
from peftcore.files.readers.reader import Reader
from peftcore.files.save_load import describe
from peftcore.files.save_load import save as save_folder
from peftcore.injection.injection import Injection
from peftcore.injection.merging import Into
from peftcore.models.opening import open_model


class JobDisplay(Protocol):
    """Shows the progress of a job."""

    def phase(self, name: str, total: int | None) -> None:
        """Begin the next phase of the work."""


def read(path: str) -> AdapterFile:
    """Read the description of an adapter file. Raises an error for a file that cannot be loaded, before any model is
    loaded."""
    about = describe(path)
    if about.problem:
        raise CheckpointError(about.problem).about(about.files[0].path)
    return AdapterFile(path, about)


def merge(
    wanted: ModelOptions,
    adapters: Sequence[AdapterFile],
    output: AdapterOutput,
    weights: Sequence[float],
    into: Into,
    max_error: float,
    display: JobDisplay,
) -> list[MergedAdapter]:
    """Merge adapters into a model, in the order of `adapters`, and save the model."""
    check_mergeable(adapters)
    source = find_source(wanted, adapters[0])
    if source.pipeline is not None and source.pipeline.resolve() in output.path.parents:
        raise BadInput(f"--out {output.shown} lies inside the pipeline, which is copied; choose a folder outside of it")
    display.phase("loading", None)
    heads = [each.made_on(wanted) for each in adapters if each.about.trained]
    opened = open_model(source.folder, made_on=next(iter(heads), source.made_on))
    injections = [
        peftcore.load(opened.model, adapter.path, name=f"adapter{index}", active=False)
        for index, adapter in enumerate(adapters)
    ]
    check_complete(opened, source.folder, injections, weights)
    display.phase("merging", None)
    peftcore.activate(opened.model, *(injection.name for injection in injections))
    merged = []
    for adapter, injection, weight in zip(adapters, injections, weights, strict=True):
        report = injection.merge(None, into=into, max_error=max_error, weight=weight)
        merged.append(MergedAdapter(adapter.path, injection.method.name, weight, len(injection.grafts), report))
    for injection in injections:
        injection.bake()
    if into == "float":
        opened.unpack()
    display.phase("writing", None)
    with output.filled() as folder:
        write(opened, source, folder)
    return merged


def convert(
    wanted: ModelOptions, adapter: AdapterFile, to: str, output: AdapterOutput, display: JobDisplay
) -> Converted:
    """Save an adapter in another format."""
    display.phase("reading", None)
    source = find_source(wanted, adapter)
    try:
        injection, weights = converted(source, adapter, to, output, False), False
    except NoWeights:
        display.phase("loading", None)
        injection, weights = converted(source, adapter, to, output, True), True
    return Converted(
        adapter=adapter.path,
        was=shown_format(adapter.about.format),
        now=shown_format(to),
        method=injection.method.name,
        sites=len(injection.grafts),
        values=numbers(injection),
        model=source.folder,
        weights=weights,
        files=files_of(output),
    )


def converted(source: ModelSource, adapter: AdapterFile, to: str, output: AdapterOutput, weights: bool) -> Injection:
    """Load an adapter on a model, with or without the model's weights, and save it in the other format.

    Raises:
        NoWeights: the conversion needs the model's weights.
    """
    injection = peftcore.load(open_model(source.folder, weights, source.made_on).model, adapter.path, name="adapter")
    with output.filled() as folder:
        save(injection, to, folder, output)
    return injection


def load_whole(wanted: ModelOptions, adapter: AdapterFile, display: JobDisplay) -> Injection:
    """Load an adapter on its model with all weights, for jobs that need them."""
    check_mergeable([adapter])
    source = find_source(wanted, adapter)
    display.phase("loading", None)
    opened = open_model(source.folder, made_on=source.made_on)
    injection = peftcore.load(opened.model, adapter.path, name="adapter")
    check_complete(opened, source.folder, [injection], [1.0])
    return injection


def export_lora(
    injection: Injection, adapter: AdapterFile, rank: int, to: str, output: AdapterOutput, max_error: float | None
) -> Exported:
    """Convert an adapter to the LoRA that is nearest to its change of the weights, and save this LoRA."""
    lora, errors = peftcore.to_lora(injection, rank)
    worst = max(errors, key=errors.__getitem__)
    if max_error is not None and not errors[worst] <= max_error:
        raise BadInput(
            f"rank {rank} loses {errors[worst]:.3g} of the change at {worst}, more than --max-error {max_error:g}; "
            "nothing was written. A higher --rank loses less"
        )
    method = injection.method.name
    injection.remove()
    with output.filled() as folder:
        save(lora, to, folder, output)
    return Exported(adapter.path, method, rank, shown_format(to), errors, numbers(lora), files_of(output))


@dataclass(frozen=True)
class NearestLoraOptions:
    """The user's options for the nearest LoRA."""

    rank: int | None = None
    """The rank of the nearest LoRA; None accepts only adapters that are equal to a LoRA."""
    texts: Path | None = None
    """A text file with one example on each line. If it is set, the nearest LoRA is computed for the outputs on these
    examples, instead of for the weights."""
    max_error: float | None = None
    """The largest accepted relative error of a site."""


def export(
    wanted: ModelOptions,
    adapter: AdapterFile,
    reader: Reader,
    output: AdapterOutput,
    projection: NearestLoraOptions,
    display: JobDisplay,
) -> ForReader:
    """Save an adapter in a form that another program reads. The model's weights are loaded only if they are needed to
    convert the adapter."""
    if projection.texts is not None and projection.rank is None:
        raise BadInput("--data only changes which LoRA is nearest; pass --project RANK too")
    display.phase("reading", None)
    source = find_source(wanted, adapter)
    try:
        opened = open_model(source.folder, False, source.made_on)
        injection = peftcore.load(opened.model, adapter.path, name="adapter")
        with output.filled() as folder:
            done = Export("as it is", as_it_is(injection, folder, reader, home=output.path), 0, {})
    except (NoWeights, ExportError):
        display.phase("loading", None)
        opened = open_model(source.folder, made_on=source.made_on)
        injection = peftcore.load(opened.model, adapter.path, name="adapter")
        display.phase("writing", None)
        data = None if projection.texts is None else _batches(source.folder, projection.texts)
        with output.filled() as folder:
            done = algebra_export(injection, folder, reader, rank=projection.rank, data=data, home=output.path)
            _check_error(done, projection.max_error)
    return ForReader(adapter.path, injection.method.name, done, files_of(output))


def _check_error(done: Export, most: float | None) -> None:
    if most is not None and not done.error <= most:
        worst = max(done.errors, key=done.errors.__getitem__)
        raise BadInput(
            f"rank {done.rank} loses {done.error:.3g} of the change at {worst}, more than --max-error {most:g}; "
            "nothing was written. A higher --project loses less"
        )


def _batches(model: Path, texts: Path) -> list[dict[str, Any]]:
    """Return one batch for each line of a text file, tokenized with the tokenizer in the model's folder."""
    try:
        lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise BadInput(f"--data {texts}: cannot be read ({error})") from None
    if not lines:
        raise BadInput(f"--data {texts}: has no lines of text")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"--data needs a tokenizer in {model}, and there is none that can be loaded ({error})") from None
    return [dict(tokenizer(line, return_tensors="pt", truncation=True)) for line in lines]


def check_mergeable(adapters: Sequence[AdapterFile]) -> None:
    """Raise an error for methods that can never be merged, before a model is loaded. Whether other methods can be
    merged depends on their options, and is checked later."""
    for adapter in adapters:
        for name in adapter.about.methods:
            if not peftcore.method(name).tags.mergeable:
                raise NotMergeable(f"{adapter.path}: {name} changes no weights, so it cannot be merged")


def save(injection: Injection, to: str, folder: Path, output: AdapterOutput) -> None:
    """Save an adapter in the format `to`. If the output is a single file, raise an error if this file is not a complete
    adapter."""
    save_folder(injection, folder, (to,), False, home=output.path)
    if output.single:
        [file] = folder.glob("*.safetensors")
        try:
            recognize(file)
        except CheckpointError as error:
            what = f"an adapter in the format {to} needs a folder, as the tensors alone do not describe it"
            raise BadInput(f"--out {output.shown}: {what}") from error


def numbers(injection: Injection) -> int:
    """Return the number of values in an adapter's tensors."""
    return sum(each.numel() for each in injection.state_dict().values())


def files_of(output: AdapterOutput) -> tuple[str, ...]:
    """Return the names of the files that were written."""
    if output.path.is_file():
        return (str(output.shown),)
    return tuple(str(output.shown / each.name) for each in sorted(output.path.iterdir()))
