"""Charts of the metric over what it costs."""

from itertools import combinations

import pytest
from made_up import report, trial
from matplotlib.text import Annotation

from peftcore_lab.reports import html, plots


@pytest.mark.parametrize("shape", [html.WIDE, html.HALF, html.NARROW], ids=["wide", "half", "narrow"])
@pytest.mark.parametrize("cost", [plots.PARAMETERS, plots.MEMORY], ids=["parameters", "memory"])
def test_no_name_covers_a_point_or_another_name(shape, cost):
    crowd = [trial(f"method number {n}", 0.8 + 0.01 * (7 * n % 11), 2_000 + 150 * (5 * n % 23)) for n in range(20)]
    with plots.style():
        figure = plots.trade_off(report(*crowd, floor=0.3), cost, shape)
        (axes,) = figure.axes
        boxes = [text.get_window_extent() for text in axes.texts if isinstance(text, Annotation)]
        points = axes.transData.transform([(cost.of(e), e.score) for e in report(*crowd).entries()])
    assert len(boxes) >= 18, "those without a name have a number, but for a few"
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert not [box for box in boxes if box.count_contains(points)]
    assert all(min(box.x0, box.y0) >= 0 and box.x1 <= shape.width and box.y1 <= shape.height for box in boxes)


def test_one_far_worse_than_all_others_is_drawn_at_the_edge():
    tight = [trial(f"lora {n}", 0.85 + 0.01 * n, 1_000 * (n + 1)) for n in range(4)]
    drawn, beyond = plots.split(report(), plots.points(report(*tight, trial("probe", 0.3, 10)), plots.PARAMETERS))
    assert [point.entry.label for point in beyond] == ["probe"] and len(drawn) == 4
    assert not plots.split(report(), drawn)[1]
    with plots.style():
        figure = plots.trade_off(report(*tight, trial("probe", 0.3, 10)), plots.PARAMETERS, html.WIDE)
    assert figure.axes[0].get_ylim()[0] > 0.8
    assert "probe (0.300)" in [text.get_text() for text in figure.axes[0].texts]


def test_a_front_of_each_chart_is_that_of_its_cost():
    slow = trial("slow", 0.9, 10, seconds_per_step=9.0)
    quick = trial("quick", 0.8, 20, seconds_per_step=1.0)
    both = report(slow, quick)
    assert [point.best for point in plots.points(both, plots.PARAMETERS)] == [True, False]
    assert [point.best for point in plots.points(both, plots.SECONDS)] == [True, True]
