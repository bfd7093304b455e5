"""What pages say of many adapters in one step is what the table of counts has."""

import re
import statistics
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "performance.md").read_text(encoding="utf-8")
SERVING = (DOCS / "serving.md").read_text(encoding="utf-8")


def counts(adapters: int) -> dict[str, tuple[float, float]]:
    """FLOPs and operations of training, by method."""
    table = PAGE.partition("<!-- begin: python -m benchmarks.many --page -->")[2].partition("<!-- end -->")[0]
    rows = re.findall(rf"^\| (\w+) \| {adapters} \| ([\d.]+) \| ([\d.]+) \|", table, re.MULTILINE)
    return {name: (float(flops), float(operations)) for name, flops, operations in rows}


def test_counts_of_shared_steps_are_said_as_they_are() -> None:
    eight, many = counts(8), counts(256)
    operations = [each for _, each in eight.values()]
    span = f"{min(operations):.1f} to {max(operations):.1f} times"
    worst = max(many, key=lambda name: many[name][1])
    assert f"{span} as many in training, {statistics.median(operations):.1f} in the median of {len(eight)}" in SERVING
    assert f"with 256 up to {many[worst][1]:.0f} times" in SERVING
    assert f"{span} those of one adapter, {statistics.median(operations):.1f} in the median" in PAGE
    assert f"up to {many[worst][1]:.0f} times with 256 (`{worst}`)" in PAGE
    assert f"eight LoRAs dispatch {eight['lora'][1]:.1f} times" in SERVING


def test_methods_that_pay_for_more_than_their_rows_are_named() -> None:
    more = sorted(name for name, (flops, _) in counts(8).items() if flops > 1.03)
    assert f"({', '.join(f'`{name}`' for name in more)})" in PAGE
