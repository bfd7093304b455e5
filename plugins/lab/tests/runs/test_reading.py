"""Options as users write them."""

from pathlib import Path

from peftcore_lab.runs.reading import load, read
from peftcore_lab.runs.run import Run


def test_a_file_says_all_and_options_go_over_it(encoder: Path, csv_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {encoder}\ntask: text-classification\ndata: {{train: {csv_file}}}\n"
        "method: {name: lora, rank: 4}\ntraining: {steps: 5, learning_rate: 1e-3}\nout: elsewhere\n",
        encoding="utf-8",
    )
    run = read(Run, load(path), [("method", "dora"), ("training.steps", 7), ("method.rank", 2)])
    assert (run.method.name, run.method.arguments, run.training.steps) == ("dora", {"rank": 2}, 7)
    assert (run.training.learning_rate, run.out) == (1e-3, Path("elsewhere"))
