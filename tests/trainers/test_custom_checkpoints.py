"""A Trainer that saves the model in a way of its own, as that of sentence-transformers: what it leaves out lies beside,
and training goes on to the bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_hosts import arguments, host, rows

import peftcore
from peftcore.errors import CheckpointError, TrainingError
from peftcore.trainers.custom_checkpoints import FILE, of_run, read_beside, save_beside
from peftcore.training import PeftcoreCallback

THEIRS = "theirs.safetensors"
BASE = {*host("bert").state_dict()}


class OwnWay(transformers.Trainer):
    """Writes the base alone, and reads all of that or nothing."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(exist_ok=True)
        whole = self.model.state_dict()
        save_file({key: whole[key].clone() for key in BASE}, folder / THEIRS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_state_dict(load_file(Path(resume_from_checkpoint) / THEIRS))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def run(folder: Path, method: str = "lora", seed: int = 0, wishes: Any = None, **changes: Any) -> tuple[Any, Any]:
    model = host("bert")
    injection = peftcore.apply(model, method, seed=seed, **(wishes or {"train": ["classifier"]}))
    made = OwnWay(
        model=model, args=arguments(folder, logging_steps=1, **changes), train_dataset=rows("bert"),
        eval_dataset=rows("bert", 4), callbacks=[PeftcoreCallback()],
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    return made, injection


def copied(injection: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in injection.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(("method", "wishes"), [("lora", None), ("adalora", {"rank": 4, "target_rank": 1})])
def test_it_goes_on_to_the_bit(method: str, wishes: Any, tmp_path: Path) -> None:
    whole, injection = run(tmp_path, method, wishes=wishes)
    whole.train()
    resumed, again = run(tmp_path, method, wishes=wishes)
    assert not same(copied(again), copied(injection))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(copied(again), copied(injection))
    held = load_file(tmp_path / "checkpoint-3" / FILE)
    frozen = {name for name, each in injection.model.named_parameters() if not each.requires_grad}
    assert not frozen & {*held} and len(held) >= len(injection.state_dict())


def test_the_best_checkpoint_is_read_at_the_end(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": True}
    made, injection = run(tmp_path, **options, metric_for_best_model="eval_loss")  # the worst
    made.train()
    best = Path(str(made.state.best_model_checkpoint))
    assert best.name == "checkpoint-3"
    assert same(copied(injection), copied(peftcore.load(host("bert"), best)))


def test_a_checkpoint_that_is_not_found_by_its_step_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "one")[0].train()
    run(tmp_path / "two", learning_rate=0.01)[0].train()
    other = str(tmp_path / "two/checkpoint-3")
    with pytest.raises(TrainingError, match="has to stay in output_dir"):  # that of this step is another run's
        run(tmp_path / "one")[0].train(resume_from_checkpoint=other)
    shutil.rmtree(tmp_path / "one/checkpoint-3")
    with pytest.raises(TrainingError, match="has to stay in output_dir"):
        run(tmp_path / "one")[0].train(resume_from_checkpoint=other)
    shutil.copytree(other, tmp_path / "one/checkpoint-3")
    run(tmp_path / "one")[0].train(resume_from_checkpoint=str(tmp_path / "one/checkpoint-3"))


def test_the_folder_is_known_by_the_state_of_the_optimizer_too(tmp_path: Path) -> None:
    made, _ = run(tmp_path, logging_strategy="no")
    made.train()
    state = transformers.TrainerState.load_from_json(str(tmp_path / "checkpoint-6/trainer_state.json"))
    assert of_run(made.args, state, made.optimizer) == tmp_path / "checkpoint-6"
    state.global_step = 3  # nothing was logged: the moments alone tell
    assert of_run(made.args, state, made.optimizer) is None
    state.global_step = 4
    assert of_run(made.args, state, made.optimizer) is None


def test_what_lies_beside_is_of_this_adapter(tmp_path: Path) -> None:
    model = host("bert")
    injection = peftcore.apply(model, "lora")
    assert read_beside(model, tmp_path) == set()
    name = next(name for name in model.state_dict() if name.endswith(".A"))
    before = copied(injection)
    for wrong in ({name: torch.zeros(1)}, {"elsewhere": torch.zeros(1)}):
        save_beside(wrong, tmp_path)
        with pytest.raises(TrainingError, match="to other adapters"):
            read_beside(model, tmp_path)
    (tmp_path / FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=FILE):
        read_beside(model, tmp_path)
    assert same(copied(injection), before)
