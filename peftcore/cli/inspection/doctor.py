"""The work of ``peftcore doctor``: finds the installed parts, the broken parts, and the missing requirements."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import peftcore
from peftcore.cli.pages import columns
from peftcore.errors import PeftcoreError
from peftcore.injection.quantization import scheme_class
from peftcore.registry.plugins import DISABLE, registry
from peftcore.utils.numbers import size
from peftcore.utils.quiet import quiet

CORE = "peftcore"
LIBRARIES = ("torch", "transformers", "diffusers", "timm")


@dataclass(frozen=True)
class PluginStatus:
    """A plugin that was loaded."""

    name: str
    distribution: str
    methods: int


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be loaded, or a method or scheme that could not be imported."""

    name: str
    distribution: str
    reason: str


@dataclass(frozen=True)
class Ambiguous:
    """A name that several methods have."""

    name: str
    write: tuple[str, ...]
    """The names to write instead."""


@dataclass(frozen=True)
class MissingRequirements:
    """The missing requirements of a distribution, or of one of its extras."""

    distribution: str
    extra: str
    missing: tuple[str, ...]

    @property
    def install(self) -> str:
        return f"pip install '{self.distribution}[{self.extra}]'" if self.extra else f"pip install {self.distribution}"


@dataclass(frozen=True)
class SchemeStatus:
    """A quantization scheme."""

    name: str
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True)
class Findings:
    """The report of ``peftcore doctor``."""

    plugins: tuple[PluginStatus, ...]
    broken: tuple[Broken, ...]
    ambiguous: tuple[Ambiguous, ...]
    disabled: tuple[str, ...]
    versions: dict[str, str | None]
    needs: tuple[MissingRequirements, ...]
    schemes: tuple[SchemeStatus, ...]
    devices: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """True if methods are installed, no plugin, method or scheme is broken, and no two methods have the same
        name."""
        return self.methods > 0 and not self.broken and not self.ambiguous

    @property
    def methods(self) -> int:
        """The number of methods of all plugins."""
        return sum(each.methods for each in self.plugins)

    def as_dict(self) -> dict[str, Any]:
        needs = [{**asdict(each), "install": each.install} for each in self.needs]
        return {"healthy": self.healthy, **asdict(self), "needs": needs}


def examine() -> Findings:
    """Collect all findings. Errors become part of the findings, and are not raised."""
    with quiet():
        found = registry()
        plugins = tuple(
            PluginStatus(each.name, each.distribution, len(each.methods)) for each in found.plugins.values()
        )
        broken = [Broken(each.name, each.distribution, each.reason) for each in found.failures]
        broken += unimportable()
        schemes, failed = packings()
        return Findings(
            plugins=plugins,
            broken=(*broken, *failed),
            ambiguous=tuple(ambiguous()),
            disabled=tuple(sorted(filter(None, map(str.strip, os.environ.get(DISABLE, "").split(","))))),
            versions=versions(),
            needs=tuple(needs()),
            schemes=schemes,
            devices=tuple(devices()),
        )


def unimportable() -> Iterator[Broken]:
    """Yield the methods that plugins list but that cannot be imported."""
    for info in peftcore.methods():
        try:
            peftcore.method(f"{info.plugin}/{info.name}")
        except Exception as error:  # whatever a module raises while it is imported
            yield Broken(f"{info.plugin}/{info.name}", info.distribution, f"{type(error).__name__}: {error}")


def ambiguous() -> Iterator[Ambiguous]:
    """Yield the names and aliases that more than one method has."""
    owners: dict[str, list[str]] = {}
    for info in peftcore.methods():
        for name in (info.name, *info.aliases):
            owners.setdefault(name, []).append(f"{info.plugin}/{name}")
    yield from (Ambiguous(name, tuple(written)) for name, written in owners.items() if len(written) > 1)


def packings() -> tuple[tuple[SchemeStatus, ...], list[Broken]]:
    """Return two lists: the quantization schemes, and those that cannot be imported. If two schemes have the same name,
    only this error is returned."""
    found, broken = [], []
    try:
        names = sorted(peftcore.schemes())
    except PeftcoreError as error:
        return (), [Broken("schemes", "", str(error))]
    for name in names:
        try:
            cls = scheme_class(name)
        except Exception as error:  # as above
            broken.append(Broken(name, "", f"{type(error).__name__}: {error}"))
            continue
        missing = tuple(cls.missing())
        found.append(SchemeStatus(name, missing, f"pip install '{cls.extra}'" if missing else ""))
    return tuple(found), broken


def distributions() -> list[str]:
    """Return peftcore and the installed distributions that contain plugins."""
    found = registry()
    written = [each.distribution for each in found.plugins.values()] + [each.distribution for each in found.failures]
    named = {each.partition(" ")[0] for each in written}
    return [CORE, *sorted(name for name in named - {CORE} if version_of(name) is not None)]


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of the libraries that define models, and of peftcore and its plugins; None for
    those that are not installed."""
    installed = {name: version_of(name) for name in (*LIBRARIES, *distributions())}
    return {"python": platform.python_version(), **installed}


def needs() -> Iterator[MissingRequirements]:
    """Yield a record for each distribution of peftcore that lacks requirements, and one for each of its extras, even if
    the extra lacks none."""
    for name in distributions():
        if version_of(name) is None:
            continue
        extras = importlib.metadata.metadata(name).get_all("Provides-Extra") or []
        wanted = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        for extra in ("", *extras):
            missing = tuple(str(each) for each in map(bare, asked(wanted, extra)) if not satisfied(each))
            if extra or missing:
                yield MissingRequirements(name, extra, missing)


def asked(wanted: list[Requirement], extra: str) -> Iterator[Requirement]:
    """Yield the requirements that `extra` adds. If `extra` is empty, yield the requirements without an extra."""
    for each in wanted:
        always = each.marker is None or each.marker.evaluate({"extra": ""})
        if always != bool(extra) and (each.marker is None or each.marker.evaluate({"extra": extra})):
            yield each


def bare(wanted: Requirement) -> Requirement:
    """Return the requirement without its condition."""
    found = Requirement(str(wanted))
    found.marker = None
    return found


def satisfied(wanted: Requirement) -> bool:
    version = version_of(wanted.name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def devices() -> Iterator[str]:
    """Yield the devices of this machine on which torch can compute."""
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield f"cuda:{index} {card.name}, {size(card.total_memory)}"
    if torch.backends.mps.is_available():
        yield "mps"
    yield f"cpu, {torch.get_num_threads()} of {os.cpu_count()} cores"


def page(found: Findings) -> RenderableType:
    """Return the findings as a page. Problems are at the end."""
    parts: list[RenderableType] = [
        *titled("Versions", versions_table(found)),
        *titled("Plugins", plugins_table(found)),
        *titled("Extras", extras_table(found)),
    ]
    if found.schemes:
        parts += titled("Quantization schemes", schemes_table(found))
    parts += titled("Devices", *found.devices)
    parts += [Text(f"broken: {each.name} ({each.distribution}): {each.reason}", "red") for each in found.broken]
    for each in found.ambiguous:
        parts.append(Text(f"ambiguous: {each.name}; write {' or '.join(each.write)}", "red"))
    if not found.methods:
        parts.append(Text("There are no methods: pip install 'peftcore[all]'", "red"))
    parts.append(Text("All is well.", "green") if found.healthy else Text("Not all is well: see above.", "red"))
    return Group(*parts)


def titled(title: str, *below: RenderableType) -> list[RenderableType]:
    return [Text(title, "bold"), *below, ""]


def versions_table(found: Findings) -> Table:
    table = columns("", "", header=False)
    for name, version in found.versions.items():
        table.add_row(name, version or Text(f"not installed: pip install {name}", "yellow"))
    return table


def plugins_table(found: Findings) -> Table:
    table = columns("", "", "", header=False)
    for each in found.plugins:
        table.add_row(each.name, each.distribution, f"{each.methods} methods" if each.methods else "no methods")
    for name in found.disabled:
        table.add_row(name, Text(f"not loaded: it is in {DISABLE}", "yellow"), "")
    return table


def extras_table(found: Findings) -> Table:
    table = columns("", "", header=False)
    for each in found.needs:
        name = f"{each.distribution}[{each.extra}]" if each.extra else each.distribution
        table.add_row(name, state(each.missing, each.install))
    return table


def schemes_table(found: Findings) -> Table:
    table = columns("", "", header=False)
    for each in found.schemes:
        table.add_row(each.name, state(each.missing, each.install))
    return table


def state(missing: tuple[str, ...], install: str) -> Text:
    return Text(f"not installed: {', '.join(missing)}. Run: {install}", "yellow") if missing else Text("there", "green")
