"""Random histories, each compared with a fresh model after each step. ``make histories`` runs more of them."""

import os
import time

import pytest
from history_machine import History
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test
from slowly import quick

SEED = int(os.environ.get("PEFTCORE_HISTORIES_SEED") or "0")
MINUTES = float(os.environ.get("PEFTCORE_HISTORIES_MINUTES") or "0")
EACH = 10
"""Histories that one call of hypothesis draws."""


def run(seed: int) -> None:
    """Draw some histories."""
    options = settings(
        max_examples=EACH,
        stateful_step_count=12,
        deadline=None,
        database=None,
        print_blob=False,
        verbosity=Verbosity.normal,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    run_state_machine_as_test(seeded(seed)(History), settings=options)


@pytest.mark.parametrize("part", quick(range(5), range(1)))
def test_histories(part: int) -> None:
    run(1000 * SEED + part)


@pytest.mark.skipif(not MINUTES, reason="make histories says for how long")
def test_more_histories() -> None:
    end, seed = time.monotonic() + 60 * MINUTES, 1000 * SEED + 100
    while time.monotonic() < end:
        run(seed)
        seed += 1
    print(f"{EACH * (seed - 1000 * SEED - 100)} histories")
