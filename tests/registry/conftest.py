"""The entry points that a test makes up."""

from collections.abc import Callable

import pytest
from plugin_toys import Point


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these entry points the only ones that are installed."""

    def replace(*points: Point) -> None:
        def entry_points(*, group: str) -> list[Point]:
            return list(points) if group == "peftcore" else []

        monkeypatch.setattr("importlib.metadata.entry_points", entry_points)

    return replace
