"""What steps of a run take: as a plan counts, on no weights, within a time, and never with an error."""

from pathlib import Path

import pytest
from looking import folder_of, real

import peftcore
from peftcore.models.costs import checkpointable, costs
from peftcore.models.dry_run import RequestedMethod
from peftcore.models.example_inputs import Size
from peftcore_lab.training.estimates import Estimates, Step

LORA = RequestedMethod("lora", {"rank": 2})
NOW = Step(4, "float32")


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_steps_are_those_of_a_plan(name: str, tmp_path: Path) -> None:
    folder = str(folder_of(name, tmp_path))
    planned = costs(folder, LORA, Size(4, None), "float32")
    assert Estimates(folder, LORA).of(NOW) == planned.memory.total
    assert Estimates(folder, None).of(NOW) == planned.full.total


def test_nothing_is_allocated(tmp_path: Path) -> None:
    counted = Estimates(str(folder_of("llama", tmp_path)), LORA)
    assert counted.of(NOW) and counted.of(Step(4, "bfloat16", True))
    for built, _ in counted._adapted.values():
        assert all(each.is_meta for each in (*built.model.parameters(), *built.model.buffers()))


def test_blocks_that_run_again_take_less(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    counted = Estimates(str(folder), LORA)
    plain, repeated = counted.of(NOW), counted.of(Step(4, "float32", True))
    assert plain is not None and repeated is not None and repeated < plain
    assert len(checkpointable(real("llama", folder))) == 2
    vit = Estimates(str(folder_of("vit", tmp_path)), LORA)
    assert vit.of(Step(4, "float32", True)) is None  # transformers does not repeat blocks of timm


def test_what_cannot_be_counted_is_none(tmp_path: Path) -> None:
    folder = str(folder_of("llama", tmp_path))
    assert Estimates("no/such/folder", LORA).of(NOW) is None
    assert Estimates(folder, RequestedMethod("lora", {"rank": -1})).of(NOW) is None
    assert Estimates(str(folder_of("wav2vec2", tmp_path)), LORA).of(NOW) is None  # its forward depends on values


def test_it_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before a step for which there is not as much time left as the last one took."""
    now = [0.0]
    monkeypatch.setattr("peftcore_lab.training.estimates.time.monotonic", lambda: now[0])
    counted = Estimates(str(folder_of("llama", tmp_path)), LORA, seconds=10.0)
    assert counted.of(NOW) is not None
    counted._counting, counted._building = 4.0, 3.0
    now[0] = 5.9
    assert counted.of(Step(4, "bfloat16")) is None  # which would be built first
    now[0] = 6.1
    assert counted.of(NOW) is None
    counted._counting = 3.0
    assert counted.of(NOW) is not None


def test_the_model_of_the_run_is_not_touched(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    model = real("llama", folder)
    before = peftcore.plan(model, "lora").trainable, [*model.state_dict()]
    Estimates(str(folder), LORA).of(NOW)
    assert (peftcore.plan(model, "lora").trainable, [*model.state_dict()]) == before
