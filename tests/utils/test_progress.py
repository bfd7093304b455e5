"""Progress bars: where tqdm is and somebody watches, and nothing otherwise."""

from typing import Any

import pytest
from training_toys import Looks, batch, found, toy

import peftcore


def test_there_is_a_progress_bar_where_tqdm_is(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = pytest.importorskip("tqdm.auto")
    titles: list[str] = []

    def bar(data: Any, desc: str, **options: Any) -> Any:
        titles.append(desc)
        return data

    monkeypatch.setattr(auto, "tqdm", bar)
    peftcore.apply(toy(), Looks, data=[batch()], target="up")  # one operator: none for building
    assert titles == ["looks looks at the data"]


def test_there_is_none_where_tqdm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    injection = peftcore.apply(toy(), Looks, data=[batch()])
    assert found(injection) != 0
