"""The Pareto front of a comparison."""

from made_up import report, trial

from peftcore.comparing.reports.trials import front


def test_front_by_another_cost():
    entries = report(trial("a", 0.9, 10, peak_memory=9), trial("b", 0.8, 20, peak_memory=5)).entries()
    better = report().better
    assert [entry.label for entry in front(entries, better)] == ["a"]
    assert [entry.label for entry in front(entries, better, lambda entry: entry.peak_memory)] == ["b", "a"]
