"""A search whose trials run on a Ray cluster. As many workers run as the cluster has room for. They share the study,
which is a file or a database that all machines of the cluster can access."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcore_lab.comparisons.comparison_on_ray import OnRay
from peftcore_lab.comparisons.running import Board
from peftcore_lab.searching.search import Search, SearchRun, work
from peftcore_lab.searching.search_outcome import SearchOutcome
from peftcore_lab.training.cluster import Silent, go_to, taken


def search_on_ray(what: Search, board: Board, cluster: OnRay) -> SearchOutcome:
    """Run a search as `search` does, with its trials on a cluster, and return its outcome. If a worker is lost, another
    worker repeats its trial.

    Raises:
        BadInput: a model, data or option cannot be used, or no configuration fits into the budget. Nothing was trained
            then.
        TrainingError: a worker was lost, and so were all its retries.
    """
    running = SearchRun(what, board)
    settings, here = what.model_dump(mode="json", exclude_unset=True), str(Path.cwd())
    with cluster.connected():
        task = cluster.task(_work)
        workers = min(cluster.room, -(-what.trials // what.at_once))
        board.begin(f"{workers} workers on Ray")
        for done in [task.remote(settings, here) for _ in range(workers)]:
            taken(done)
        return running.finish(cluster)


def _work(settings: dict[str, Any], here: str) -> int:
    """Run trials of the study in a process of the cluster. Return the number of trials so far."""
    go_to(here)
    return work(Search.model_validate(settings), Silent())
