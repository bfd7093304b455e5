"""Runs that train together come to what they come to by themselves, on one model."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from silent import Silent
from tiny import TINY, save_tokenizer

import peftcore
from peftcore.errors import TrainingError
from peftcore.training import Fleet
from peftcore_lab.comparisons.compare import compare
from peftcore_lab.comparisons.comparison import Comparison
from peftcore_lab.comparisons.running import together
from peftcore_lab.runs.run import Run
from peftcore_lab.searching.search import Search, search
from peftcore_lab.training.fleet_runs import Saved, key, train_together
from peftcore_lab.training.train import Outcome, train

TRAINING = {"steps": 7, "batch_size": 8, "evaluate_every": 3, "checkpoints": False}


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder without dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("calm")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=save_tokenizer(folder), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **TINY
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def run(model: Path, data: Path, out: Path, method: Any, rate: float = 1e-2, **training: Any) -> Run:
    return Run.model_validate(
        {
            "model": str(model),
            "task": "text-classification",
            "data": {"train": str(data)},
            "method": method,
            "training": {**TRAINING, "learning_rate": rate, **training},
            "out": out,
        }
    )


METHODS: list[tuple[Any, float]] = [
    ({"name": "lora", "rank": 2}, 1e-2),
    ({"name": "lora", "rank": 4, "target": "all-linear"}, 3e-3),
    ({"name": "ia3"}, 5e-2),
    ({"name": "adalora"}, 1e-2),
]


@pytest.mark.slow
def test_each_comes_to_what_it_comes_to_alone(calm: Path, csv_file: Path, tmp_path: Path) -> None:
    """Scores on the way, losses, sizes, and the saved adapter, also over the end of an epoch."""

    def runs(where: str) -> list[Run]:
        return [
            run(calm, csv_file, tmp_path / where / str(n), method, rate, steps=15, weight_decay=0.1, clip=0.5)
            for n, (method, rate) in enumerate(METHODS)
        ]

    found, saved = train_together(runs("together"), Silent())
    assert saved is not None and (saved.runs, saved.forwards, saved.alone) == (4, 15, 60)
    for one, other in zip(found, [train(each, Silent()) for each in runs("alone")], strict=True):
        assert isinstance(one, Outcome)
        for name in ("method", "trainable", "total", "steps", "train_size", "held_out_size", "floor"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.before == pytest.approx(other.before, abs=1e-5)
        assert one.after == pytest.approx(other.after, abs=1e-4)
        assert dict(one.curve) == pytest.approx(dict(other.curve), abs=1e-4)
        assert dict(one.losses) == pytest.approx(dict(other.losses), abs=2e-4)
        files = [Path(each.saved) / "adapter.safetensors" for each in (one, other)]
        values = [safetensors.torch.load_file(each) for each in files]
        assert values[0].keys() == values[1].keys()
        for name, value in values[1].items():
            torch.testing.assert_close(values[0][name], value, rtol=1e-3, atol=1e-4)
        written = json.loads((Path(one.saved).parent / "metrics.json").read_text())
        assert written["steps"] == 15 and (Path(one.saved).parent / "run.json").exists()


def test_what_trains_together(calm: Path, csv_file: Path, tmp_path: Path) -> None:
    def made(method: Any = "lora", **training: Any) -> Run:
        return run(calm, csv_file, tmp_path / "run", method, **training)

    assert key(made()) is not None
    assert key(made()) == key(made("ia3", rate=1.0)) == key(made({"name": "lora", "rank": 3}))
    for other in (made(seed=1), made(steps=3), made(weight_decay=0.1)):
        assert key(other) not in (None, key(made()))
    whole = [each.name for each in peftcore.methods() if not each.tags.per_row]
    for alone in ("full", whole[0]):
        assert key(made(alone)) is None
    for training in ({"checkpoints": True}, {"accumulate": 2}, {"checkpoint_gradients": True}):
        assert key(made(**training)) is None


def test_a_run_that_fails_leaves_the_others(calm: Path, csv_file: Path, tmp_path: Path) -> None:
    runs = [run(calm, csv_file, tmp_path / str(rate), "lora", rate) for rate in (1e-2, 1e30)]
    good, bad = train_together(runs, Silent())[0]
    assert isinstance(good, Outcome) and good.steps == 7
    assert isinstance(bad, TrainingError) and "the loss became" in str(bad)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
@pytest.mark.slow
def test_what_has_no_room_together_trains_one_by_one(
    error: Exception, calm: Path, csv_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Fleet) -> None:
        raise error

    monkeypatch.setattr(Fleet, "step", full)
    board = Silent()
    found: list[str] = []
    monkeypatch.setattr(board, "say", found.append)
    report = compare(comparison(calm, csv_file, tmp_path, together=2), board)
    assert not report.failed and not report.together and {each.together for each in report.trials} == {1}
    assert any("out of memory with 2 runs at once" in said for said in found)


def comparison(model: Path, data: Path, out: Path, **more: Any) -> Comparison:
    methods = [{"name": "lora", "rank": 2, "label": "two"}, "full", {"name": "lora", "rank": 4, "label": "four"}, "ia3"]
    given = {"model": str(model), "data": {"train": str(data)}, "methods": methods, "out": out}
    return Comparison.model_validate({**given, "training": {"steps": 4, "batch_size": 8}, "seeds": [0, 1], **more})


def test_groups_are_no_larger_than_asked_for(calm: Path, csv_file: Path, tmp_path: Path) -> None:
    def labels(size: int) -> list[list[str]]:
        asked = comparison(calm, csv_file, tmp_path, together=size)
        return [[each.called for each in group] for group in together(asked, asked.methods, 0)]

    assert labels(1) == [["two"], ["full"], ["four"], ["ia3"]]
    assert labels(2) == [["two", "four"], ["full"], ["ia3"]]
    assert labels(9) == [["two", "four", "ia3"], ["full"]]


@pytest.mark.slow
def test_a_comparison_says_the_same_and_what_it_saved(calm: Path, csv_file: Path, tmp_path: Path) -> None:
    alone = compare(comparison(calm, csv_file, tmp_path / "alone"), Silent())
    report = compare(comparison(calm, csv_file, tmp_path / "together", together=8), Silent())
    assert [(each.label, each.seed) for each in report.trials] == [(each.label, each.seed) for each in alone.trials]
    for one, other in zip(report.trials, alone.trials, strict=True):
        assert one.after == pytest.approx(other.after, abs=1e-4) and one.file_size == other.file_size
        assert one.together == (1 if one.method == "full" else 3) and other.together == 1
    assert len(report.together) == 2 and not alone.together
    assert all("3 runs together: one base" in each and "4 forwards of it in training instead of 12" in each
               for each in report.together)  # fmt: skip
    assert json.loads((tmp_path / "together" / "results.json").read_text())["together"] == list(report.together)


@pytest.mark.slow
def test_a_search_of_16_configurations_holds_one_base(
    encoder: Path, csv_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the demonstration does it: texts of classes. Models are counted while they train."""
    from peftcore.fleets.fleet import Fleet

    counts: list[tuple[int, int]] = []
    step = Fleet.step

    def counting(self: Fleet) -> Any:
        counts.append((len(models() - before), len(self.active)))
        return step(self)

    def models() -> set[int]:
        gc.collect()
        held = [each for each in gc.get_objects() if isinstance(each, transformers.BertForSequenceClassification)]
        return {id(each) for each in held if not next(each.parameters()).is_meta}

    before = models()  # of other tests

    monkeypatch.setattr(Fleet, "step", counting)
    what = {
        "model": str(encoder),
        "data": {"train": str(csv_file)},
        "methods": {"lora": {"rank": [1, 2, 4, 8], "target": ["attn.q", "all-linear"], "dropout": [0.0, 0.1]}},
        "training": {"steps": 3, "batch_size": 8},
        "trials": 16,
        "together": 16,
        "seeds": [0],
        "confirm": 1,
        "out": tmp_path / "search",
    }
    found = search(Search.model_validate(what), Silent())
    assert counts[0] == (1, 16) and {models for models, _ in counts} == {1}
    assert len(found.tried.trials) == 16 and {each.together for each in found.tried.trials} == {16}
    (said,) = found.tried.together
    assert "16 runs together" in said and "3 forwards of it in training instead of 48" in said


def test_what_was_saved_in_words() -> None:
    words = str(Saved(runs=16, base_bytes=91_000_000, forwards=100, alone=1600))
    assert "one base of 91.0 MB" in words and "100 forwards" in words and "1,600" in words
