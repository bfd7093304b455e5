"""Pairs of answers, learned by direct preference optimization: its equation a second time, in float64, row by row."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from silent import Silent
from tiny import BAD, GOOD
from torch import Tensor, nn

import peftcore
from peftcore.errors import BadInput
from peftcore_lab.comparisons.compare import compare
from peftcore_lab.comparisons.comparison import Comparison
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks.preference import PreferenceData
from peftcore_lab.tasks.task import Prepared
from peftcore_lab.tasks.task_catalogue import find
from peftcore_lab.training import fleet_runs
from peftcore_lab.training import train as job
from peftcore_lab.training.run_trainer import AdapterTrainer, trainer_for

pytest.importorskip("trl", reason="TRL is not installed")
preferred = importlib.import_module("peftcore_lab.tasks._dpo").preferred
BETA = 0.3
ROWS = [
    {"prompt": f"{a} {b}", "chosen": good, "rejected": f"{bad} and {bad}"}
    for a, b in [("my", "phone"), ("the", "plane was so"), ("so", "is today")]
    for good, bad in zip(GOOD, BAD, strict=True)
]


@pytest.fixture
def talker(talker: Path) -> Path:
    """The shared one, with the same weights each time, so large that adapters of noise make a difference."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(talker, initializer_range=0.1)
    transformers.GPT2LMHeadModel(config).save_pretrained(talker)
    return talker


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Ten pairs to score, which batches do not divide evenly."""
    for name, rows in (("train", ROWS), ("held_out", ROWS[:10])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"train": str(tmp_path / "train.jsonl"), "held_out": str(tmp_path / "held_out.jsonl"), "beta": BETA}


def run(model: Path, data: dict[str, Any], out: Path, method: Any = "lora", **more: Any) -> Run:
    training = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "report_to": [], **more.pop("training", {})}
    given = {"model": str(model), "task": "preference", "data": data, "training": training, "out": out}
    return Run.model_validate({**given, **({} if "adapter" in more else {"method": method}), **more})


def noisy(injection: peftcore.Injection) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def started(asked: Run, noise: bool = True) -> tuple[Prepared, peftcore.Injection, AdapterTrainer]:
    task = find("preference")
    prepared = task.prepare(asked, PreferenceData.model_validate(asked.data))
    injection = job.adapted(asked, prepared)
    if noise:
        noisy(injection)
    return prepared, injection, trainer_for(asked, task, prepared, injection, [])


def log_probs(model: Any, row: dict[str, Any]) -> list[Tensor]:
    """Of the preferred answer and the other one: what its tokens cost together, each after those before it."""
    found = []
    for answer in (row["chosen_ids"], row["rejected_ids"]):
        ids, begin = row["prompt_ids"] + answer, len(row["prompt_ids"])
        labels = [-100] * begin + answer  # by them a method knows where the prompt ends
        scores = model(torch.tensor([ids]), labels=torch.tensor([labels])).logits[0, -len(ids) :].log_softmax(-1)
        found.append(torch.stack([scores[place - 1, ids[place]] for place in range(begin, len(ids))]).sum())
    return found


def loss_of(model: Any, reference: Any, rows: Any) -> tuple[Tensor, list[float]]:
    """The mean of -log sigmoid(beta * margin), and the margins."""
    margins = []
    for row in rows:
        with torch.no_grad():
            base = log_probs(reference, row)
        chosen, rejected = log_probs(model, row)
        margins.append((chosen - base[0]) - (rejected - base[1]))
    losses = [torch.log(1 + torch.exp(-BETA * margin)) for margin in margins]
    return torch.stack(losses).mean(), [margin.item() for margin in margins]


def untouched(model: Path | str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()


METHODS: list[Any] = [
    {"name": "lora", "target": "all-linear"},
    {"name": "prompt_tuning", "length": 2},  # rows before the tokens
    {"name": "adalora"},  # a loss of its own
    {"name": "linear_probe"},  # the head, past which TRL would go
    {"name": "lora", "target": ["lm_head"]},
    {"name": "loreft", "suffix_positions": 1, "tied": True},  # acts on the prompt alone
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_loss_and_gradients_of_the_first_step(method: Any, talker: Path, data: Any, tmp_path: Path) -> None:
    prepared, injection, trainer = started(run(talker, data, tmp_path / "run", method))
    rows = [trainer.train_dataset[number] for number in range(6)]
    model: Any = prepared.model.train()
    loss = trainer.compute_loss(model, trainer._prepare_inputs(prepared.collate(rows)))
    loss.backward()
    trained = [each for each in model.parameters() if each.grad is not None]
    gradients = [each.grad.double() for each in trained]
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)

    model.double().zero_grad()
    model(torch.tensor([[5, 6]]))
    own = injection.losses()
    expected, margins = loss_of(model, untouched(talker), rows)
    (expected + own).backward()
    assert max(map(abs, margins)) > 1e-3
    assert loss.item() == pytest.approx((expected + own).item(), rel=1e-5)
    for parameter, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_scores_weigh_pairs_and_not_batches(talker: Path, data: Any, tmp_path: Path) -> None:
    prepared, _, trainer = started(run(talker, data, tmp_path / "run", training={"batch_size": 3}))
    found = trainer.evaluate()
    loss, margins = loss_of(prepared.model.double().eval(), untouched(talker), prepared.held_out)
    assert found["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["eval_reward_accuracy"] == sum(margin > 0 for margin in margins) / 10
    assert 0 < found["eval_reward_accuracy"] < 1
    assert found["eval_reward_margin"] == pytest.approx(BETA * sum(margins) / 10, rel=1e-4)


def test_several_processes_have_batches_of_other_sizes() -> None:
    """The Trainer would weigh their losses; this is of all margins together."""
    found = preferred(transformers.EvalPrediction(np.array([2.0, -1.0, 0.0]), np.zeros(3)))
    expected = sum(math.log(1 + math.exp(-margin)) for margin in (2, -1, 0)) / 3
    assert found == {
        "loss": pytest.approx(expected),
        "reward_accuracy": pytest.approx(1 / 3),
        "reward_margin": pytest.approx(1 / 3),
    }


def test_the_whole_model_is_held_to_its_first_weights(talker: Path, data: Any, tmp_path: Path) -> None:
    asked = run(talker, data, tmp_path / "run", "full")
    outcome = job.train(asked, Silent())
    held_out = find("preference").prepare(asked, PreferenceData.model_validate(data)).held_out
    loss, margins = loss_of(untouched(outcome.saved), untouched(talker), held_out)
    assert outcome.before["loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)
    assert outcome.after["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert outcome.after["reward_accuracy"] == sum(margin > 0 for margin in margins) / 10 > 0.9


def test_an_adapter_that_goes_on_is_held_to_what_it_was(talker: Path, data: Any, tmp_path: Path) -> None:
    """As after supervised training: the reference is the model that was trained, not the base of it."""
    _, injection, _ = started(run(talker, data, tmp_path / "first", {"name": "lora", "dropout": 0.5}))
    injection.save(tmp_path / "adapter")
    asked = run(talker, data, tmp_path / "run", adapter=str(tmp_path / "adapter"))
    _, _, trainer = started(asked, noise=False)
    assert abs(trainer.evaluate()["eval_reward_margin"]) < 1e-6


def test_stopped_and_resumed_it_ends_the_same(
    talker: Path, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the reference is the first weights, which no checkpoint holds."""

    class Stopped(Exception):
        pass

    end = job.DisplayCallback.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise Stopped

    for method in ({"name": "lora", "dropout": 0.2}, "full"):
        name = str(method)
        options = {"method": method, "training": {"evaluate_every": 3}}
        whole = job.train(run(talker, data, tmp_path / f"whole {name}", **options), Silent())
        cut = run(talker, data, tmp_path / f"cut {name}", **options)
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(job.DisplayCallback, "on_step_end", stop)
            job.train(cut, Silent())
        resumed = job.train(cut, Silent(), resume=True)
        assert (resumed.before, resumed.after, resumed.curve) == (whole.before, whole.after, whole.curve)
        files = [next(Path(each.saved).glob("*.safetensors")).read_bytes() for each in (whole, resumed)]
        assert files[0] == files[1]


def test_the_best_checkpoint_is_not_the_first_of_those_that_are_right(talker: Path, data: Any, tmp_path: Path) -> None:
    outcome = job.train(run(talker, data, tmp_path / "run"), Silent())
    assert dict(outcome.curve)[2] == 1.0  # all pairs, already
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-6/trainer_state.json").read_text(encoding="utf-8"))
    assert outcome.after["loss"] == min(each["eval_loss"] for each in state["log_history"] if "eval_loss" in each)


def test_dropout_of_the_base_is_off_and_that_of_the_adapter_is_on(talker: Path, data: Any, tmp_path: Path) -> None:
    prepared, injection, _ = started(run(talker, data, tmp_path / "run", {"name": "parallel_adapter", "dropout": 0.2}))
    inside = {id(module) for operator in injection.operators.values() for module in operator.modules()}
    for module in prepared.model.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == (0.2 if id(module) in inside else 0.0)


@pytest.mark.slow
def test_compared_and_not_trained_together(
    talker: Path, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet computes the model's own loss, and here there is another one."""
    runs = [run(talker, data, tmp_path / str(rank), {"name": "lora", "rank": rank}) for rank in (1, 2)]
    monkeypatch.setattr(fleet_runs, "kind_of", lambda model: "ForCausalLM")
    monkeypatch.setattr(fleet_runs._Group, "train", lambda group: pytest.fail("they train together"))
    assert fleet_runs.train_together(runs, Silent()) == ([None, None], None)
    asked = Comparison.model_validate({
        **{"model": str(talker), "task": "preference", "data": data, "out": tmp_path / "comparison", "together": 4},
        **{"methods": ["lora", "full"], "training": {"steps": 6, "batch_size": 4, "learning_rate": 1e-2}},
    })  # fmt: skip
    report = compare(asked, Silent())
    assert [each.method for each in report.trials] == ["lora", "full"]
    assert all(each.after["reward_accuracy"] > 0.9 and each.together == 1 for each in report.trials)


def test_tokens_of_pairs(talker: Path, data: Any, tmp_path: Path) -> None:
    """Both begin with the prompt as the model reads it; what does not differ in so many tokens is left out."""
    task, asked = find("preference"), run(talker, data, tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(talker)
    row = task.prepare(asked, PreferenceData.model_validate(data)).train[0]
    texts = [tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert texts == ["[UNK] my phone [SEP] [UNK]", "fine [SEP]", "awful and awful [SEP]"]
    short = task.prepare(asked, PreferenceData.model_validate({**data, "max_length": 6}))
    assert len(short.train) == 4 and short.collate([short.train[0]])["input_ids"].shape == (2, 6)
    with pytest.raises(BadInput, match="no pair has answers that differ within 3 tokens"):
        task.prepare(asked, PreferenceData.model_validate({**data, "max_length": 3}))


def test_what_cannot_be(talker: Path, decoder: Path, data: Any, tmp_path: Path) -> None:
    task = find("preference")
    with pytest.raises(BadInput, match=r"no chat template; set data\.chat_template"):
        task.prepare(run(decoder, data, tmp_path / "run"), PreferenceData.model_validate(data))
    assert task.prepare(
        run(decoder, data, tmp_path / "run"), PreferenceData.model_validate({**data, "chat_template": "chatml"})
    )
    with pytest.raises(BadInput, match="eva computes the model's loss on batches before training"):
        started(run(talker, data, tmp_path / "run", "eva"))


def test_weights_are_not_cut(talker: Path, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(BadInput, match="does not support sharding"):
        started(run(talker, data, tmp_path / "run"))
