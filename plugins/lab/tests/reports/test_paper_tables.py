"""Tables for papers: means, deviations and seeds, in CSV, Markdown and LaTeX."""

import csv
import io
import statistics

from made_up import report, seeds, trial

from peftcore_lab.reports.paper_tables import as_csv, as_latex, as_markdown, lines

TRIALS = (*seeds("lora_a&b", 0.8, 1234), *seeds("full", 0.75, 1_000_000))


def test_lines_are_means_and_deviations_of_a_sample() -> None:
    first, second = lines(report(*TRIALS))
    assert first.mean == statistics.mean([0.79, 0.81]) and first.deviation == statistics.stdev([0.79, 0.81])
    assert (first.seeds, first.best, second.best, second.target) == ((0, 1), True, False, "all parameters")
    [alone] = lines(report(trial("lora", 0.8, 10)))
    assert alone.deviation is None
    worse, better = (trial(name, score, 10, metric="perplexity") for name, score in (("a", 2.0), ("b", 1.0)))
    small, large = lines(report(worse, better, metric="perplexity", greater=False))
    assert (small.best, large.best) == (False, True)


def test_csv_has_the_numbers_as_they_are() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(report(*TRIALS)))))
    assert [row["method"] for row in rows] == ["lora_a&b", "full"]
    assert float(rows[0]["accuracy_std"]) == statistics.stdev([0.79, 0.81])
    assert rows[0] | {"accuracy_mean": "", "accuracy_std": ""} == {
        "method": "lora_a&b", "target": "a\"b'c<i>", "learning_rate": "0.001", "trainable": "1234",
        "share": "0.001234", "accuracy_mean": "", "accuracy_std": "", "seeds": "0 1",
    }  # fmt: skip


def test_markdown() -> None:
    text = as_markdown(report(*TRIALS))
    assert "| lora_a&b | a\"b'c<i> | 0.001 | 1,234 | 0.123% | **0.800 ± 0.014** |" in text
    assert "| full | all parameters | 0.001 | 1,000,000 | 100% | 0.750 ± 0.014 |" in text
    assert text.endswith("accuracy on 400 validation examples, mean ± standard deviation over seeds 0, 1\n")


def test_latex() -> None:
    text = as_latex(report(*TRIALS))
    assert r"lora\_a\&b & a" + "\"b'c<i>" + r" & 0.001 & 1,234 & 0.123\% & $\mathbf{0.800 \pm 0.014}$ \\" in text
    assert r"100\% & $0.750 \pm 0.014$ \\" in text
    assert text.count(r"\\") == 3 and text.count(" & ") == 15


def test_a_score_that_is_no_number_is_not_the_best() -> None:
    nan, other = lines(report(trial("a", float("nan"), 10), trial("b", 0.5, 10)))
    assert (nan.best, other.best) == (False, True)
    assert "not a number" in as_markdown(report(trial("a", float("nan"), 10)))


def test_scores_of_each_task_stand_behind_those_of_all() -> None:
    found = report(
        trial("a", 0.5, 10, after={"accuracy": 0.5, "accuracy/x": 0.25, "accuracy/y|z": 0.75}),
        trial("b", 0.5, 10, after={"accuracy": 0.5, "accuracy/x": 0.5, "accuracy/y|z": 0.5}),
    )
    assert found.tasks == ("x", "y|z")
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [(row["accuracy/x_mean"], row["accuracy/y|z_mean"], row["accuracy/x_std"]) for row in rows] == [
        ("0.25", "0.75", ""),
        ("0.5", "0.5", ""),
    ]
    markdown = as_markdown(found)
    assert r"| share | accuracy | x | y\|z |" in markdown
    assert "| **0.500** | 0.250 | **0.750** |" in markdown and "| **0.500** | **0.500** | 0.500 |" in markdown
    latex = as_latex(found)
    assert r"{llrrrrrr}" in latex and r"$\mathbf{0.500}$ & $0.250$ & $\mathbf{0.750}$ \\" in latex
