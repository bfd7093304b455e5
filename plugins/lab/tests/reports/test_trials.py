"""The Pareto front of a comparison, and what its headings call the model and the examples."""

from dataclasses import replace
from pathlib import Path

from made_up import report, trial

from peftcore_lab.reports.plots import draw_picture
from peftcore_lab.reports.trials import front


def test_front_by_another_cost():
    entries = report(trial("a", 0.9, 10, peak_memory=9), trial("b", 0.8, 20, peak_memory=5)).entries()
    better = report().better
    assert [entry.label for entry in front(entries, better)] == ["a"]
    assert [entry.label for entry in front(entries, better, lambda entry: entry.peak_memory)] == ["b", "a"]


def test_a_heading_does_not_say_where_things_lie_on_a_disk(tmp_path: Path, monkeypatch):
    headings = []
    monkeypatch.setattr("peftcore_lab.reports.plots.trade_off", lambda *given: headings.append(given[-1]) or NoFigure())
    for model, name in {
        "/usr/lib/python3/site-packages/encoder": "encoder",
        "package:encoder/model": "encoder",
        "package:encoder": "encoder",
        "someone/encoder": "encoder",
        "models/encoder.gguf": "encoder.gguf",
        ".": ".",
    }.items():
        found = replace(report(trial("lora", 0.9, 10)), model=model, data="/home/someone/texts.csv")
        assert found.model_name == name
        draw_picture(found, tmp_path / "picture.png")
        assert headings.pop() == f"{found.task} · texts.csv · {name}"


class NoFigure:
    """A picture that is not drawn."""

    def savefig(self, *_: object, **__: object) -> None: ...
