"""The page of ``peftcore plan`` for people: where the method would act, and what that costs beside full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftcore.cli.looking.folding import fold
from peftcore.cli.pages import columns, share, spelled, tensors, times
from peftcore.comparing.numbers import size
from peftcore.comparing.plans.costs import Costs, Memory
from peftcore.comparing.plans.recorded import Place, Recorded

FULL = "full fine-tuning"
MEMORY = {
    "weights": "weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "AdamW's states",
    "activations": "activations",
    "total": "at least",
}


def page(costs: Costs) -> RenderableType:
    """Return the whole page."""
    parts: list[RenderableType] = [heading(costs), "", sites(costs.recorded), "", totals(costs), "", step(costs)]
    parts.append(memory(costs))
    if costs.activations.unknown:
        parts.append(f"activations: not known: {costs.activations.unknown}")
    parts += [Text(f"note: {note}", "yellow") for note in costs.notes]
    return Group(*parts)


def heading(costs: Costs) -> Text:
    options = "".join(f" {name}={spelled(value)}" for name, value in costs.recorded.options.items())
    return Text.assemble((costs.recorded.name, "bold"), f"{options} on ", costs.skeleton.title)


def sites(recorded: Recorded) -> Table:
    """Return a table of the places, one row for what is alike."""
    table = columns("target module", "", "weight", "adapter", "trainable", right=frozenset({"", "trainable"}))
    for name, alike in rows((*recorded.places, *recorded.shared)):
        number = f"×{len(alike)}" if len(alike) > 1 else ""
        trainable = sum(place.trainable for place in alike)
        table.add_row(name, number, times(alike[0].shape), tensors(alike[0].tensors), f"{trainable:,}")
    return table


def rows(places: Sequence[Place]) -> Iterator[tuple[str, list[Place]]]:
    """Yield places that differ in the numbers of their paths only, in the order of the first of each."""
    alike: dict[tuple[object, ...], dict[str, Place]] = {}
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
        f" of {plan.total:,} ({share(plan.share)}), target modules {len(plan.sites)}, file ",
        (size(costs.file_size), "bold"),
    )


def step(costs: Costs) -> str:
    batch = costs.activations.batch
    if batch is None:
        return "One step of training:"
    shapes = ", ".join(f"{name} {times(shape)}" for name, shape in batch.shapes.items())
    return f"One step of training ({shapes}{'' if batch.loss else '; without a loss'}):"


def memory(costs: Costs) -> Table:
    name = costs.recorded.name
    table = columns("", name, FULL, right=frozenset({name, FULL}))
    for key, label in MEMORY.items():
        cells = [known(each, key) for each in (costs.memory, costs.full)]
        table.add_row(f"  {label}", *cells, style="bold" if key == "total" else "")
    return table


def known(memory: Memory, key: str) -> str:
    value = memory.as_dict()[key]
    return "not known" if value is None else size(value) if value else "-"
