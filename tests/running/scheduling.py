"""How tests are given to the workers of a run: a file or another group at a time, and never again what ended a worker.

A quick run gives whole files, whose fixtures are made once, those with most tests first. In other runs single tests
take seconds or minutes, and each goes to the worker that is free; what shares something long goes together.

Of xdist's own scheduler by groups, 3.8, three things are mended. Pytest 9.2 took away what it marks groups by, so
groups follow from names. It went through all that had run, and through all names, for each test: a tenth of the time of
a run of 20,000. And a worker that ends in the middle of a test, out of memory or by a hang that `timeout` ends, made
the run wait for ever: the one in its place was given a single test, which no worker begins before it knows the next.
"""

from __future__ import annotations

from typing import Any

import covering
import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    by_file = "not slow" in config.getoption("markexpr")

    class ByGroup(LoadScopeScheduling):
        """Units of work have the tests that have not run."""

        def __init__(self, config: pytest.Config, log: Any) -> None:
            super().__init__(config, log)
            self.numbers: dict[Any, dict[str, int]] = {}

        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if by_file else covering.scope(nodeid)

        def add_node_collection(self, node: Any, collection: Any) -> None:
            super().add_node_collection(node, collection)
            self.numbers[node] = {name: number for number, name in enumerate(collection)}

        def schedule(self) -> None:
            super().schedule()
            for node in self.nodes:
                self._reschedule(node)

        def _assign_work_unit(self, node: Any) -> None:
            scope, unit = self.workqueue.popitem(last=False)
            self.assigned_work.setdefault(node, {})[scope] = unit
            node.send_runtest_some([self.numbers[node][name] for name in unit])

        def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
            name = self.registered_collections[node][item_index]
            units, scope = self.assigned_work[node], self._split_scope(name)
            del units[scope][name]
            if not units[scope]:
                del units[scope]
            self._reschedule(node)

        def remove_node(self, node: Any) -> str | None:
            """Return the test in which the worker ended, which failed; the others of its are run elsewhere."""
            units = self.assigned_work.pop(node)
            ended: str | None = next((name for unit in units.values() for name in unit), None)
            if ended is not None:
                units[self._split_scope(ended)].pop(ended)
                self.workqueue.update((scope, unit) for scope, unit in units.items() if unit)
                for other in self.nodes:
                    self._reschedule(other)
            return ended

    return ByGroup(config, log)
