"""TRL's own tests of adapters, with peft itself and with `peftcore.compat` in its place.

    python tests/side_by_side/trl_tests.py CHECKOUT [--only EXPRESSION] [--hub FOLDER]

CHECKOUT is a checkout of huggingface/trl, at the tag of the installed version or the nearest one there is: its tests
whose names have *peft* or *lora* run from there, against its own code, and none of them is kept here. What they fetch
is made by the checkout's own scripts (`trl_hub`), once for both runs; the second run has our names where TRL and the
tests import peft's (`trl_in_place`). All else is the same.

A row a test: what became of it with peft, with ours, and the reason, if both are not the same or neither passed.
The last lines are the totals, and the exit status is 1 when a test passes with peft and not with ours.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from trl_hub import Hub
from trl_in_place import HUB, OURS

HERE = Path(__file__).parent
PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
LIMIT = 300
"""The seconds after which a test that hangs is ended."""


@dataclass(frozen=True)
class Outcome:
    """What became of a test: the verdict, and why it is not *passed*."""

    verdict: str
    reason: str = ""


def run(tests: Path, hub: Path, *, ours: bool, only: str | None = None) -> dict[str, Outcome]:
    """Run the tests in a process of their own.

    Args:
        tests: a checkout of TRL.
        hub: the folder of `trl_hub.Hub`.
        ours: whether our names stand in the place of peft's.
        only: an expression of pytest's ``-k``.

    Returns:
        The outcome of each test, by file, class and name.

    Raises:
        RuntimeError: pytest did not run them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "trl_in_place", "-p", "no:cacheprovider", "tests"]
        command += ["-o", "norecursedirs=tests/invariant", "--continue-on-collection-errors"]  # experimental ones too
        command += [f"--timeout={LIMIT}", f"--junit-xml={report}", f"--basetemp={scratch}/base"]
        command += ["-k", only] if only else []
        paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
        variables = {"PYTHONPATH": paths, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        variables |= {HUB: str(hub), **({OURS: "1"} if ours else {})}
        done = subprocess.run(
            command, cwd=tests, env={**os.environ, **variables}, text=True, capture_output=True, check=False
        )
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return read(report)


def read(report: Path) -> dict[str, Outcome]:
    """Returns the outcomes in a report of pytest, of what failed to be collected too."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name')}".removeprefix("tests.").lstrip(".")
        verdict, reason = PASSED, ""
        for tag, become in (("skipped", SKIPPED), ("failure", FAILED), ("error", FAILED)):
            if (why := case.find(tag)) is not None:
                verdict, reason = become, " ".join(why.get("message", "").split())
        found[name] = Outcome(verdict, reason)
    return found


def table(theirs: dict[str, Outcome], ours: dict[str, Outcome]) -> list[str]:
    """Returns the rows, and the totals below."""
    gone = Outcome("not there")
    rows, counts = [], Counter[tuple[str, str]]()
    for name in sorted({*theirs, *ours}):
        one, other = theirs.get(name, gone), ours.get(name, gone)
        counts[one.verdict, other.verdict] += 1
        rows.append(f"| {name} | {one.verdict} | {other.verdict} | {(other.reason or one.reason)[:300]} |")
    with_peft = sum(number for (one, _), number in counts.items() if one == PASSED)
    both = counts[PASSED, PASSED]
    rows.append(f"{both} of {with_peft} tests that pass with peft pass with peftcore.compat.")
    rows += [f"{number}: {one} with peft, {other} with ours" for (one, other), number in sorted(counts.items())]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of huggingface/trl")
    parser.add_argument("--only", help="an expression of pytest's -k")
    parser.add_argument("--hub", type=Path, help="a folder for what the tests fetch, kept for the next run")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        hub = (given.hub or Path(scratch, "hub")).resolve()
        if not hub.exists():
            Hub(given.checkout.resolve(), hub).make()
        theirs, ours = (run(given.checkout.resolve(), hub, ours=each, only=given.only) for each in (False, True))
    print(*table(theirs, ours), sep="\n")
    passed = {name for name, each in theirs.items() if each.verdict == PASSED}
    return int(any(ours.get(name, Outcome(FAILED)).verdict != PASSED for name in passed))


if __name__ == "__main__":
    sys.exit(main())
