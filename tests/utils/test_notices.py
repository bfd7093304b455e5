"""Notices are logged once in a process."""

import logging

import pytest

from peftcore.utils import notices


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "told", set())


def test_each_line_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    notices.notice(["one", "100% of two"])
    notices.notice(["one", "three"])
    assert [(each.name, each.levelname, each.message) for each in caplog.records] == [
        ("peftcore", "WARNING", line) for line in ("one", "100% of two", "three")
    ]


def test_what_nobody_could_hear_is_told_later(caplog: pytest.LogCaptureFixture) -> None:
    logging.disable(logging.WARNING)
    try:
        notices.notice(["one"])
    finally:
        logging.disable(logging.NOTSET)
    notices.notice(["one"])
    assert caplog.messages == ["one"]
