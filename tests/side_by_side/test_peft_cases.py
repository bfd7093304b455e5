"""What became of the adapters that peft's own test suite makes, without its checkout: `peft_cases.py` has made the list,
and here each adapter is made again in our words, written for peft, opened by peft, and read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import LIST, LAYERS, READ, REFUSED, SideBySide, WRITTEN, Verdict, applied, peft_opens, table
from peft_folders import assert_same

import peftcore
from peftcore.files.safe_io import read_json

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
VERDICTS = [Verdict(**each) for each in json.loads(LIST.read_text(encoding="utf-8"))]
ROOT = Path(__file__).parents[2]
MOST_REFUSED = 6
"""Of the models that the suite builds itself."""


def by_method() -> dict[str, list[dict[str, Any]]]:
    """Each adapter that is written, once, by method."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for each in VERDICTS:
        if each.ours and each.written == WRITTEN:
            found.setdefault(each.ours["method"], {})[json.dumps(each.ours, sort_keys=True)] = each.ours
    return {method: list(adapters.values()) for method, adapters in sorted(found.items())}


ADAPTERS = by_method()


def test_the_list_has_all_of_peft_s_cases() -> None:
    assert sum(each.suite == "custom" for each in VERDICTS) == 331
    assert {each.suite for each in VERDICTS} == {"custom", "decoder", "encoder_decoder", "vision", "mixed"}


def test_nothing_differs() -> None:
    assert not [each for each in VERDICTS if "differs" in (each.read, each.written)]


def test_what_is_refused_has_a_reason() -> None:
    assert all(each.reason for each in VERDICTS if REFUSED in (each.read, each.written))


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_is_written_and_read(method: str, tmp_path: Path) -> None:
    for index, ours in enumerate(ADAPTERS[method]):
        base, model, run, injection = applied(ours)
        injection.save(tmp_path / str(index), format="peft")
        again = peftcore_loads(base, tmp_path / str(index))
        with torch.no_grad():
            assert_same(run(base), run(model), run(peft_opens(base, tmp_path / str(index))))
            assert_same(run(base), run(again), run(model))
