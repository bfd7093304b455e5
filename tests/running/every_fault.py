"""Runs operations with a fault at every point, and prints after which something is neither as before nor as after; the
exit status is 1 if there is any.

    python tests/running/every_fault.py [PART OF A NAME ...] [--every 10] [--seed 1] [--seconds 600] [--kind line]

`--every 10` takes a tenth of the faults, by the seed. After `--seconds` no further one is tried; operations follow each
other in an order by the seed then.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/toys"))

from fault_scenes import CASES  # noqa: E402

from peftcore.testing.fault_points import KINDS  # noqa: E402
from peftcore.testing.faults import inject_faults  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--often", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--kind", action="append", choices=KINDS)
    given = parser.parse_args()
    chosen = [name for name in CASES if not given.names or any(part in name for part in given.names)]
    end = None
    if given.seconds is not None:
        random.Random(given.seed).shuffle(chosen)
        end = time.monotonic() + given.seconds
    found = tried = 0
    for name in chosen:
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            break
        case, begin = CASES[name], time.monotonic()
        try:
            report = inject_faults(
                case.operation, case.make, name=name, kinds=given.kind or KINDS, every=given.every, often=given.often,
                seed=given.seed, leave=case.leave, ends=case.ends, seconds=left,
            )  # fmt: skip
        except Exception as error:  # the others still count
            print(f"{name}: cannot be tried: {type(error).__name__}: {error}", flush=True)
            found += 1
            continue
        print(f"{report}\n  points: {report.points}, {time.monotonic() - begin:.0f} s", flush=True)
        found, tried = found + len(report.found), tried + sum(report.tried.values())
    print(f"{tried} faults in {len(chosen)} operations, {found} with a wrong end")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
