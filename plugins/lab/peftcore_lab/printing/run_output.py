"""A training run on the terminal: scores before and after, sample answers of the model, the folder of the adapter."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftcore_lab.training.train import Outcome


def show(outcome: Outcome, console: Console) -> None:
    """Print the outcome in readable form."""
    table = Table("", "before", "after", box=box.SIMPLE_HEAD)
    for name, after in outcome.after.items():
        table.add_row(name, f"{outcome.before[name]:.4g}", f"{after:.4g}")
    console.print(table)
    for earlier, now in outcome.samples:
        console.print(f"[dim]before:[/dim] {escape(earlier)}\n[dim]after:[/dim]  {escape(now)}\n", highlight=False)
    console.print(
        f"{outcome.method}: {outcome.trainable:,} of {outcome.total:,} parameters trained in {outcome.steps} steps, "
        f"{outcome.seconds:.0f} s\nsaved in {outcome.saved}",
        highlight=False,
    )
