"""``peftcore.compare``: methods on any module, trained and scored by the user's functions."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import BadInput, TargetError, TrainingError, UnknownMethod

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = X.sin().sum(1, keepdim=True)


def host() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def loss(model: nn.Module) -> Tensor:
    return nn.functional.mse_loss(model(X), Y)


def train(model: nn.Module, injection: Any) -> None:
    if injection is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:
        optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (loss(model) + 0.001 * torch.rand(())).backward()
        optimizer.step()


def score(model: nn.Module) -> float:
    with torch.no_grad():
        return loss(model).item()


def compared(*methods: Any, **options: Any) -> Any:
    given = {"train": train, "score": score, "greater": False, "metric": "loss", **options}
    return peftcore.compare(given.pop("model", None) or host(), methods, **given)


def test_each_method_comes_to_what_it_comes_to_by_hand() -> None:
    model = host()
    before = copy.deepcopy(model.state_dict())
    small = {"name": "lora", "rank": 1, "target": ["0", "2"], "label": "small"}
    found = compared(small, {"name": "lora", "target": ["0", "2"]}, "full", model=model, seeds=(0, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [line.label for line in found.lines] == ["small", "lora", "full"]
    for seed in (0, 1):
        own = host()
        torch.manual_seed(seed)
        injection = peftcore.apply(own, "lora", rank=1, target=["0", "2"], seed=seed)
        torch.manual_seed(seed)
        train(own, injection)
        trial = next(each for each in found.report.trials if (each.label, each.seed) == ("small", seed))
        assert trial.after == {"loss": score(own)} and trial.before == {"loss": score(host())}
        assert trial.trainable == 6 + 8 + 8 + 1 and trial.file_size > 4 * trial.trainable
    assert found.lines[2].trainable == found.report.trials[-1].total == sum(p.numel() for p in host().parameters())
    best = min(found.lines, key=lambda line: line.mean)
    assert [line for line in found.lines if line.best] == [best] and found.lines[0].deviation > 0


def test_a_function_makes_the_model() -> None:
    assert compared("bitfit", model=host).lines == compared("bitfit", model=host()).lines


def test_tables(tmp_path: Path) -> None:
    found = compared("bitfit", "full")
    assert "| bitfit |" in str(found) and found._repr_markdown_() == str(found)
    assert found.as_csv().startswith("method,target,") and r"\begin{tabular}" in found.as_latex()
    found.write(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"results.{e}" for e in ("json", "csv", "md", "tex")
    }
    assert len(json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["trials"]) == 2


def test_what_cannot_be_compared_is_refused_before_anything_is_trained() -> None:
    def never(model: nn.Module, injection: Any) -> None:
        raise AssertionError

    for methods, error in (
        ((), BadInput), (("lora", "lora"), BadInput), (("bitfit", "lroa"), UnknownMethod),
        (("bitfit", {"name": "lora", "target": "nowhere"}), TargetError),
    ):  # fmt: skip
        with pytest.raises(error):
            compared(*methods, train=never)
    with pytest.raises(BadInput):
        compared("bitfit", seeds=(), train=never)


def test_a_training_that_fails_is_reported() -> None:
    def fails(model: nn.Module, injection: Any) -> None:
        if injection is None:
            raise TrainingError("it went wrong")
        train(model, injection)

    assert compared("bitfit", "full", train=fails).report.failed == {"full": "it went wrong"}
    with pytest.raises(TrainingError, match="full: it went wrong"):
        compared("full", train=fails)
