"""Progress displays on standard error: one bar for a single run, and two bars for a comparison. The latter show the
finished runs, and the steps of the current run."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class BarDisplay:
    """A display with one bar; messages are printed above it."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description:<10}"), *columns, console=console, transient=True)
        self._steps = self._progress.add_task("", total=None)

    def __enter__(self) -> BarDisplay:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def phase(self, name: str, total: int | None) -> None:
        self._progress.reset(self._steps, total=total, description=name)

    def advance(self) -> None:
        self._progress.advance(self._steps)

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False)


class Bars:
    """A display with two bars, for runs and for steps. One line is printed for each finished run."""

    def __init__(self, console: Console, runs: int) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description:<26}"), *columns, console=console, transient=True)
        self._methods = self._progress.add_task("runs", total=runs)
        self._steps = self._progress.add_task("", total=None)
        self._method = ""

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, label: str) -> None:
        self._method = label
        self.phase("loading", None)

    def phase(self, name: str, total: int | None) -> None:
        self._progress.reset(self._steps, total=total, description=f"{self._method}: {name}")

    def advance(self) -> None:
        self._progress.advance(self._steps)

    def say(self, line: str) -> None:
        """Ignore a message during training, since the scores are in the report."""

    def finish(self, line: str) -> None:
        self._progress.advance(self._methods)
        self._progress.console.print(line, highlight=False)
