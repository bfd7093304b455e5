"""Numbers as people read them."""

import math

from peftcore.utils.numbers import SPACE, decimals, digits, duration, fixed, listed, percent, short, size, work


def test_numbers():
    assert [size(n).replace(SPACE, " ") for n in (999, 1_200, 3_600_000_000)] == ["999 B", "1.20 kB", "3.60 GB"]
    assert [work(n).replace(SPACE, " ") for n in (5e3, 2.85e14)] == ["5.00 kFLOP", "285 TFLOP"]
    assert [short(n) for n in (512, 10_000, 2_500_000)] == ["512", "10k", "2.5M"]
    assert [percent(n) for n in (1, 0.0236, 0.0000034)] == ["100%", "2.36%", "0.000340%"]
    assert [digits(n) for n in (0.2, 12, 345.6)] == ["0.200", "12.0", "346"]
    assert [fixed(v, decimals([v])) for v in (0.91234, 12.345, 54_321.0, math.inf)] == ["0.912", "12.35", "54,321", "∞"]
    assert decimals([2.1, 224.9]) == 2, "the best perplexity keeps its digits beside the worst"
    times = [duration(seconds).replace(SPACE, " ") for seconds in (45, 720, 3599.9, 4210)]
    assert times == ["45 s", "12 min", "1 h 0 min", "1 h 10 min"]
    assert [listed(range(n)) for n in (1, 2, 3)] == ["0", "0 and 1", "0, 1 and 2"]
