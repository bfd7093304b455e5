"""Random histories, each step compared with what ought to come out. ``make histories`` runs more of them."""

import os
import time
from typing import NamedTuple

import pytest
from history_faults import FaultyHistory
from history_fleets import FleetHistory
from history_guidance import GuidedHistory
from history_machine import History
from history_peft import PeftHistory
from history_rows import RowHistory
from history_tables import TableHistory
from history_threads import History as ThreadHistory
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import seed as seeded
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from slowly import quick

from peftcore.errors import PeftcoreError

SEED = int(os.environ.get("PEFTCORE_HISTORIES_SEED") or "0")
MINUTES = float(os.environ.get("PEFTCORE_HISTORIES_MINUTES") or "0")


class Kind(NamedTuple):
    """A kind of histories.

    Attributes:
        machine: draws one.
        each: how many one call of hypothesis draws, which takes some seconds.
    """

    machine: type[RuleBasedStateMachine]
    each: int


KINDS = {
    "models": Kind(History, 10),
    "faults": Kind(FaultyHistory, 5),
    "fleets": Kind(FleetHistory, 4),
    "peft": Kind(PeftHistory, 5),
    "rows": Kind(RowHistory, 3),
    "tables": Kind(TableHistory, 5),
    "guidance": Kind(GuidedHistory, 6),
}


def run(kind: Kind, seed: int) -> None:
    """Draw some histories."""
    options = settings(
        max_examples=kind.each,
        stateful_step_count=12,
        deadline=None,
        database=None,
        print_blob=False,
        verbosity=Verbosity.normal,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    run_state_machine_as_test(seeded(seed)(kind.machine), settings=options)


@pytest.mark.parametrize("part", quick(range(5), range(1)))
@pytest.mark.parametrize("kind", KINDS)
def test_histories(kind: str, part: int) -> None:
    run(KINDS[kind], 1000 * SEED + part)


@pytest.mark.parametrize("part", quick(range(5), range(1)))
def test_histories_of_threads(part: int) -> None:
    for seed in range(10):
        ThreadHistory(1000 * SEED + 10 * part + seed).check()


def test_without_locks_of_models_threads_mix_their_changes() -> None:
    """What the histories of threads are for: without locks some end as no order of the operations does."""
    for seed in range(100):
        try:
            ThreadHistory(seed, excludes=False).check()
        except Exception as error:
            if not isinstance(error, PeftcoreError):
                return
    raise AssertionError("none of these histories needs a lock")


@pytest.mark.skipif(not MINUTES, reason="make histories says for how long")
@pytest.mark.parametrize("kind", KINDS)
def test_more_histories(kind: str) -> None:
    """Each kind has its share of the minutes."""
    end, seed = time.monotonic() + 60 * MINUTES / len(KINDS), 1000 * SEED + 100
    while time.monotonic() < end:
        run(KINDS[kind], seed)
        seed += 1
    print(f"{KINDS[kind].each * (seed - 1000 * SEED - 100)} histories of {kind}")


@pytest.mark.skipif(not MINUTES, reason="make histories says for how long")
def test_more_histories_of_threads() -> None:
    end, first = time.monotonic() + 60 * MINUTES / len(KINDS), 100_000 * SEED + 1000
    seed = first
    while time.monotonic() < end:
        ThreadHistory(seed).check()
        seed += 1
    print(f"{seed - first} histories of threads")


def test_a_failing_history_prints_a_script() -> None:
    history = FaultyHistory()
    history.begin("mlp", ["lora"])
    history.merge("a", "cpu", "float")
    history.fail_in("unmerge", "a", 1, "KeyboardInterrupt")
    history.fail_in("unmerge", "b", 1, "KeyboardInterrupt")
    history.outputs_are_right()
    assert history.script is not None
    lines = history.script.end().splitlines()
    assert lines[:2] == ["model, inputs = HOSTS['mlp'].build()  # of peftcore.testing", "model.double().eval()"]
    assert lines[2].startswith("peftcore.apply(model, 'lora', ") and "name='a'" in lines[2]
    assert lines[3:] == [
        "fill(peftcore.injections(model)['a'], 1)  # of peftcore.testing.kit",
        "peftcore.injections(model)['a'].merge('cpu', into='float')",
        "with fails(1, 'KeyboardInterrupt'):",
        "    peftcore.injections(model)['a'].unmerge()  # raises KeyboardInterrupt",
    ]
