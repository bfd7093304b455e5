"""How tests are given to the workers of a run: what shares something in one group, and never again what ended a worker.

Of xdist's own scheduler by groups, 3.8, two things are mended. Pytest 9.2 took away what it marks groups by, so groups
follow from names. And a worker that ends in the middle of a test, out of memory or by a hang that `timeout` ends, made
the run wait for ever: the one in its place was given a single test, which no worker begins before it knows the next.
"""

from __future__ import annotations

from typing import Any

import covering
import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return covering.scope(nodeid)

        def schedule(self) -> None:
            super().schedule()
            for node in self.nodes:
                self._reschedule(node)

        def remove_node(self, node: Any) -> str | None:
            """Return the test in which the worker ended, which failed; the others of its are run elsewhere."""
            units = self.assigned_work.pop(node)
            left = [name for unit in units.values() for name, done in unit.items() if not done]
            if not left:
                return None
            units[self._split_scope(left[0])][left[0]] = True
            self.workqueue.update((scope, unit) for scope, unit in units.items() if not all(unit.values()))
            for other in self.nodes:
                self._reschedule(other)
            return left[0]

    return ByGroup(config, log)
