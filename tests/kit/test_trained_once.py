"""What the kit trains is trained once a machine, and a file of the cache is never trusted further than it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore.testing import learning_tasks
from peftcore.testing.trained_once import CACHE, folder, trained_once

LIKE = {"weight": torch.zeros(2, 3), "count": torch.zeros((), dtype=torch.int64)}


class Training:
    """Counts how often it trains."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Mapping[str, Tensor]:
        self.times += 1
        return {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(7)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def _once(train: Training, recipe: str = "recipe") -> None:
    found = trained_once("host", recipe, train, LIKE)
    assert sorted(found) == ["count", "weight"]
    assert torch.equal(found["weight"], torch.arange(6.0).view(2, 3)) and found["count"].item() == 7


def test_it_is_trained_once_for_a_recipe(cache: Path) -> None:
    train = Training()
    _once(train)
    _once(train)
    assert train.times == 1
    _once(train, "another recipe")
    assert train.times == 2
    written = sorted(path.name for path in cache.iterdir())
    assert len(written) == 2 and all(name.startswith("host-") and name.endswith(".safetensors") for name in written)


def test_another_version_of_a_library_trains_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Training()
    _once(train)
    monkeypatch.setattr("importlib.metadata.version", lambda library: f"{library} of tomorrow")
    _once(train)
    assert train.times == 2


def _cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def _of_another_shape(file: Path) -> None:
    save_file({**LIKE, "weight": torch.zeros(3, 2)}, file)


def _of_another_dtype(file: Path) -> None:
    save_file({**LIKE, "weight": torch.zeros(2, 3, dtype=torch.float64)}, file)


def _one_missing(file: Path) -> None:
    save_file({"weight": torch.zeros(2, 3)}, file)


def _not_finite(file: Path) -> None:
    save_file({**LIKE, "weight": torch.full((2, 3), torch.nan)}, file)


def _a_pickle(file: Path) -> None:
    torch.save(LIKE, file)


def _a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "damage", [_cut_off, _of_another_shape, _of_another_dtype, _one_missing, _not_finite, _a_pickle]
)
def test_a_damaged_file_is_made_anew(damage: Callable[[Path], None], cache: Path) -> None:
    train = Training()
    _once(train)
    [file] = cache.iterdir()
    whole = file.read_bytes()
    damage(file)
    _once(train)
    assert (train.times, file.read_bytes(), list(cache.iterdir())) == (2, whole, [file])


def test_where_nothing_can_be_written_nothing_is_kept(cache: Path) -> None:
    train = Training()
    cache.write_text("a file stands where the folder would be")
    _once(train)
    cache.unlink()
    _once(train)
    [file] = cache.iterdir()
    _a_folder(file)
    _once(train)
    assert train.times == 3


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert folder() == tmp_path / ".cache/peftcore"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert folder() == tmp_path / "caches/peftcore"


def test_a_user_without_a_home_trains_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    train = Training()
    _once(train)
    _once(train)
    assert train.times == 2


def test_a_host_of_a_task_from_the_cache_is_the_one_that_was_trained(cache: Path) -> None:
    steps: list[int] = []

    def loss(model: nn.Module, step: int) -> Tensor:
        steps.append(step)
        value: Tensor = model(torch.randn(4, 3)).square().mean()
        return value

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    first, second = (learning_tasks._learned("small", make, loss, 1e-2) for _ in range(2))
    assert steps == list(range(400)), "the second was trained too"
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    for model in (first, second):
        assert not any(module.training for module in model.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_scores_of_full_fine_tuning_are_kept(cache: Path) -> None:
    trained: list[nn.Module] = []

    def pretrained() -> nn.Module:
        torch.manual_seed(0)
        trained.append(nn.Linear(3, 1))
        return trained[-1]

    def loss(model: nn.Module, batch: learning_tasks.Batch) -> Tensor:
        value: Tensor = model(batch["x"]).square().mean()
        return value

    task = learning_tasks.LearningTask(
        "small", pretrained, lambda i: {"x": torch.ones(2, 3)}, loss, lambda m, b: -loss(m, b).item()
    )
    first = learning_tasks.full_fine_tuning.__wrapped__(task)
    assert len(trained) == 3 and first > task.scored(pretrained())
    before = len(trained)
    assert learning_tasks.full_fine_tuning.__wrapped__(task) == first
    assert len(trained) == before
