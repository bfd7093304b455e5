"""Other libraries are silent within a block, and as before after it."""

import logging
import warnings

import pytest

from peftcore.utils.quiet import LOUD_IMPORTS, hush_imports, no_bars, quiet, unlogged


def test_nothing_below_an_error_is_logged_within_a_block(caplog: pytest.LogCaptureFixture) -> None:
    with unlogged():
        logging.getLogger("some.library").warning("no news")
        logging.getLogger("some.library").error("news")
    logging.getLogger("some.library").warning("after")
    assert caplog.messages == ["news", "after"]


def test_no_warning_is_shown_within_a_block() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("no news", stacklevel=1)
        warnings.warn("after", stacklevel=1)
    assert [str(each.message) for each in caught] == ["after"]


def test_loggers_of_imports_log_errors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [logging.getLogger(name) for name in LOUD_IMPORTS]
    for each in loggers:
        monkeypatch.setattr(each, "level", each.level)
    hush_imports()
    assert all(each.level == logging.ERROR for each in loggers)


def test_bars_are_no_concern_where_no_library_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # an import would fail
    no_bars()
