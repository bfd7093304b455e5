"""What became of the adapters that peft's own test suite makes, without its checkout.

`peft_cases.py` has made the list; here each adapter is made again in our words, written for peft, opened by peft, and
read back.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import DIFFERS, LIST, REFUSED, WRITTEN, Verdict, applied, peft_opens
from peft_folders import assert_same

import peftcore

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
VERDICTS = [Verdict(**each) for each in json.loads(LIST.read_text(encoding="utf-8"))]


def adapters() -> dict[str, list[dict[str, Any]]]:
    """Each adapter that is written, once, by method."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for each in VERDICTS:
        if each.ours and each.written == WRITTEN:
            found.setdefault(each.ours["method"], {})[json.dumps(each.ours, sort_keys=True)] = each.ours
    return {method: list(held.values()) for method, held in sorted(found.items())}


ADAPTERS = adapters()


def test_the_list_has_the_cases_of_all_suites() -> None:
    assert sum(each.suite == "custom" for each in VERDICTS) == 331
    assert {each.suite for each in VERDICTS} == {"custom", "decoder", "encoder_decoder", "vision", "mixed"}


def test_nothing_differs() -> None:
    assert not [each for each in VERDICTS if DIFFERS in (each.read, each.written)]


def test_what_is_refused_has_a_reason() -> None:
    assert all(each.reason for each in VERDICTS if REFUSED in (each.read, each.written))


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_is_written_and_read(method: str, tmp_path: Path) -> None:
    for index, ours in enumerate(ADAPTERS[method]):
        path = tmp_path / str(index)
        base, model, run, injection = applied(ours)
        injection.save(path, format="peft")
        again = deepcopy(base)
        peftcore.load(again, path)
        with torch.no_grad():
            plain, output = run(base), run(model)
            assert_same(plain, output, run(peft_opens(base, path)))
            assert_same(plain, run(again), output)
