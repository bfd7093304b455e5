"""Runs operations with a fault at every point, and prints after which something is neither as before nor as after; the
exit status is 1 if there is any.

    python tests/running/every_fault.py [PART OF A NAME ...] [--every 10] [--seed 1] [--seconds 600] [--kind line]
    python tests/running/every_fault.py --methods [PART OF A NAME ...] [--most 3]

With `--methods` the operations are those of each method's life (`peftcore.testing.checks_faults`) on one host, else
those of the core (`fault_scenes`) and those with other libraries (`fault_scenes_outside`). `--every 10` takes a tenth
of the faults, `--most 3` no more than three of each kind of point, by the seed. After `--seconds` no further one is
tried; operations follow each other in an order by the seed then.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/toys"))

from declared_cases import declared  # noqa: E402
from fault_scenes import CASES  # noqa: E402
from fault_scenes_outside import OUTSIDE  # noqa: E402

import peftcore  # noqa: E402
from peftcore.testing.checks_faults import break_step, life  # noqa: E402
from peftcore.testing.fault_points import KINDS  # noqa: E402
from peftcore.testing.faults import FaultReport, inject_faults  # noqa: E402

METHOD_HOSTS = ("mlp", "encoder", "llama", "convnet", "vit", "unet", "t5", "moe")


Run = Callable[..., FaultReport]
"""Breaks an operation, with options of `inject_faults`."""


def of_the_core() -> dict[str, Run]:
    """The operations of `fault_scenes` and `fault_scenes_outside`, by name."""
    cases = CASES | OUTSIDE

    def broken(name: str) -> Run:
        case = cases[name]
        return partial(inject_faults, case.operation, case.make, name=name, leave=case.leave, ends=case.ends)

    return {name: broken(name) for name in cases}


def of_methods() -> dict[str, Run]:
    """The operations of each method's life, on the first host on which it can act: "merge lora", "load ia3"."""
    found: dict[str, Run] = {}
    for info in peftcore.methods():
        told = declared(info)
        case = next((case for case in map(told.case, METHOD_HOSTS) if case.inapplicable is None), None)
        if case is None:
            print(f"{info.name}: acts on none of {', '.join(METHOD_HOSTS)}", flush=True)
        else:
            found |= {f"{step} {info.name}": partial(break_step, case, step) for step in life(case)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--most", type=int, default=None)
    parser.add_argument("--often", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--kind", action="append", choices=KINDS)
    given = parser.parse_args()
    runs = of_methods() if given.methods else of_the_core()
    chosen = [name for name in runs if not given.names or any(part in name for part in given.names)]
    end = None
    if given.seconds is not None:
        random.Random(given.seed).shuffle(chosen)
        end = time.monotonic() + given.seconds
    found = tried = done = 0
    for name in chosen:
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            break
        begin = time.monotonic()
        try:
            report = runs[name](
                kinds=given.kind or KINDS, every=given.every, most=given.most, often=given.often, seed=given.seed,
                seconds=left,
            )  # fmt: skip
        except Exception as error:  # the others still count
            print(f"{name}: cannot be tried: {type(error).__name__}: {error}", flush=True)
            found += 1
            continue
        print(f"{report}\n  points: {report.points}, {time.monotonic() - begin:.0f} s", flush=True)
        found, tried, done = found + len(report.found), tried + sum(report.tried.values()), done + 1
    print(f"{tried} faults in {done} operations, {found} with a wrong end")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
