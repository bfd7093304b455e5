"""Charts of scores and losses over steps."""

import pytest
from made_up import TOTAL, report, trial

from peftcore_lab.reports import curves, html, plots


def test_perplexities_far_apart_are_drawn_by_their_ratios():
    trials = [trial("a", 20.0, 10, metric="perplexity", before={"perplexity": 5_000.0})]
    given = report(*trials, metric="perplexity", greater=False)
    with plots.style():
        figure = curves.draw(curves.scores(given), "perplexity", True, html.WIDE)
    assert figure.axes[0].get_yscale() == "log"


def test_a_mean_stops_where_one_of_its_seeds_stopped():
    early = trial("lora", 0.8, 10, seed=0, curve=[(10, 0.6), (20, 0.8)])
    late = trial("lora", 0.9, 10, seed=1, curve=[(10, 0.7), (20, 0.6), (30, 0.9)])
    (curve,) = curves.scores(report(early, late))
    assert curve.steps == (0, 10, 20)
    assert curve.mean == pytest.approx((0.25, 0.65, 0.7))
    assert (curve.low[1], curve.high[1]) == (0.6, 0.7)
    assert curve.result == pytest.approx(0.85), "what is written beside it is the score of the table"


def test_many_curves_have_a_chart_each():
    few = curves.losses(report(*(trial(f"m{n}", 0.8, 10 + n) for n in range(6)), trial("full", 0.9, TOTAL)))
    many = curves.losses(report(*(trial(f"m{n}", 0.8, 10 + n) for n in range(7))))
    with plots.style():
        together = curves.draw(few, "training loss", True, html.HALF)
        apart = curves.draw(many, "training loss", True, html.NARROW)
    assert len(together.axes) == 1 and len(apart.axes) == 7
    assert {text.get_text().strip() for text in together.axes[0].texts} == {*(f"m{n}" for n in range(6)), "full"}
    colours = {line.get_color() for line in together.axes[0].lines}
    assert len(colours) == 7
    assert [axes.get_title("left") for axes in apart.axes] == [f"m{n}" for n in range(7)]
