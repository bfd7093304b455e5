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
from peft_cases import DIFFERS, LIST, REFUSED, WRITTEN, applied, moved, peft_opens
from peft_pairs import OUTPUTS, difference

import peftcore

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
CASES: list[dict[str, Any]] = json.loads(LIST.read_text(encoding="utf-8"))
OFTEN = ("llama", "t5")
"""The models of transformers on which each adapter is made in a quick run; layers by themselves all are."""


def adapters() -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """Each adapter that is written, by method, and by whether a quick run has it."""
    found: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for each in CASES:
        if "ours" in each and each["written"] == WRITTEN and "reason" not in each:
            ours = each["ours"]
            found.setdefault((ours["method"], not isinstance(ours["host"], str) or ours["host"] in OFTEN), []).append(
                ours
            )
    return found


ADAPTERS = adapters()


def test_the_list_has_the_cases_of_all_suites() -> None:
    assert sum(each["count"] for each in CASES if each["suite"] == "custom") == 331
    assert {each["suite"] for each in CASES} == {"custom", "decoder", "encoder_decoder", "vision", "mixed"}


def test_nothing_differs() -> None:
    assert not [each for each in CASES if DIFFERS in (each["read"], each.get("written"))]


def test_what_is_refused_has_a_reason() -> None:
    assert all(each["reason"] for each in CASES if REFUSED in (each["read"], each.get("written")))


def test_six_are_refused() -> None:
    """Where peft computes something that is no weight, or norms of something that it does not compute."""
    refused = [each for each in CASES if each["suite"] == "custom" and each["read"] == REFUSED]
    assert sum(each["count"] for each in refused) == 6
    assert all("peft computes something else" in each["reason"] for each in refused)


@pytest.mark.share(3)
@pytest.mark.parametrize(
    ("method", "quick"),
    [pytest.param(*key, marks=() if key[1] else pytest.mark.slow, id=f"{key[0]}{'' if key[1] else '-rest'}")
     for key in ADAPTERS],
)  # fmt: skip
def test_an_adapter_is_written_and_read(method: str, quick: bool, tmp_path: Path) -> None:
    for index, ours in enumerate(ADAPTERS[method, quick]):
        path = tmp_path / str(index)
        base, model, run, injection = applied(ours)
        injection.save(path, format="peft")
        again = deepcopy(base)
        peftcore.load(again, path)
        with torch.no_grad():
            output = run(model)
            assert difference(run(peft_opens(base, path)), output) <= OUTPUTS, ours
            assert difference(run(again), output) <= OUTPUTS, ours
        assert moved(base, model, run) >= 10 * OUTPUTS, ours
