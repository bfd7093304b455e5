"""The page that ``peftcore plan`` prints: the target modules of a method, and its costs compared with full
fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftcore.cli.inspection.folded_paths import fold
from peftcore.cli.pages import columns, frozen, share, spelled, tensors, times
from peftcore.models.costs import Costs, Memory
from peftcore.models.dry_run import PlannedSite, Recorded
from peftcore.utils.numbers import size, work

FULL = "full fine-tuning"
MEMORY = {
    "weights": "weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "AdamW's states",
    "activations": "activations",
    "gathered": "gathered",
    "total": "together",
    "peak": "at the peak",
}


def page(costs: Costs) -> RenderableType:
    """Return the whole page."""
    parts: list[RenderableType] = [heading(costs), "", sites(costs.recorded), "", totals(costs), "", step(costs)]
    parts.append(memory(costs))
    if costs.counted.unknown:
        parts.append(f"activations: not known: {costs.counted.unknown}")
    if costs.adapters > 1:
        parts += ["", residents(costs)]
    parts += [Text(f"note: {note}", "yellow") for note in costs.notes]
    return Group(*parts)


def heading(costs: Costs) -> Text:
    options = "".join(f" {name}={spelled(value)}" for name, value in costs.recorded.options.items())
    return Text.assemble((costs.recorded.name, "bold"), f"{options} on ", costs.skeleton.title)


def sites(recorded: Recorded) -> Table:
    """Return a table of the target modules. Equal modules have one common row."""
    table = columns("target module", "", "weight", "adapter", "trainable", right=frozenset({"", "trainable"}))
    for name, alike in rows((*recorded.places, *recorded.shared)):
        number = f"×{len(alike)}" if len(alike) > 1 else ""
        trainable = sum(place.trainable for place in alike)
        table.add_row(name, number, times(alike[0].shape), tensors(alike[0].tensors), f"{trainable:,}")
    return table


def rows(places: Sequence[PlannedSite]) -> Iterator[tuple[str, list[PlannedSite]]]:
    """Yield groups of equal target modules whose paths differ only in numbers. The groups are in the order of their
    first modules."""
    alike: dict[tuple[object, ...], dict[str, PlannedSite]] = {}
    for place in places:
        kind = (place.shape, tuple(place.tensors.items()), place.trainable)
        alike.setdefault(kind, {})[place.name] = place
    order = {place.name: index for index, place in enumerate(places)}
    folded = [(name, [same[path] for path in paths]) for same in alike.values() for name, paths in fold(same).items()]
    yield from sorted(folded, key=lambda row: order[row[1][0].name])


def totals(costs: Costs) -> Text:
    plan = costs.recorded.plan
    return Text.assemble(
        "trainable ",
        (f"{plan.trainable:,}", "bold"),
        f" of {plan.total:,} ({share(plan.share)}){frozen(plan)}, target modules {len(plan.sites)}, file ",
        (size(costs.file_size), "bold"),
    )


def step(costs: Costs) -> str:
    batch = costs.counted.batch
    if batch is None:
        return "One step of training:"
    shapes = ", ".join(f"{name} {times(shape)}" for name, shape in batch.shapes.items())
    return f"One step of training ({shapes}{'' if batch.loss else '; without a loss'}):"


def memory(costs: Costs) -> Table:
    """Return a table of the memory and operations of a training step: a column for the method, and one for full
    fine-tuning. With several processes, another column has the first process, which needs the most memory."""
    name, passes = costs.recorded.name, [costs.counted.adapted, costs.counted.full]
    shown = {name: costs.memory, FULL: costs.full}
    if costs.sharded:
        shown = {name: costs.memory, f"each of {len(costs.sharded)}": costs.sharded[0], FULL: costs.full}
        passes.insert(1, costs.counted.adapted)
    table = columns("", *shown, right=frozenset(shown))
    for key, label in MEMORY.items():
        if key != "gathered" or costs.sharded:
            cells = [known(each, key) for each in shown.values()]
            table.add_row(f"  {label}", *cells, style="bold" if key in ("total", "peak") else "")
    table.add_row("  operations", *(operations(each.flops) for each in passes))
    return table


def known(memory: Memory, key: str) -> str:
    value = memory.as_dict()[key]
    return "not known" if value is None else size(value) if value else "-"


def operations(flops: int | None) -> str:
    return "not known" if flops is None else work(flops)


def residents(costs: Costs) -> str:
    """Return text with the memory of several adapters that are on the model at the same time."""
    each = costs.recorded.plan.resident
    return (
        f"{costs.adapters:,} adapters resident: {size(costs.resident)} ({size(each)} each), "
        f"{size(costs.memory.weights + costs.resident)} with the weights"
    )
