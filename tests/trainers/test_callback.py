"""transformers' Trainer on hosts adapted in place: small checkpoints, exact resume, the best model, a clean base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from training_hosts import STEPS, host, rows, trainer

import peftcore
from peftcore.errors import TrainingError
from peftcore.testing.tools import differences, trace
from peftcore.training import MethodOptimizer, PeftcoreCallback

CASES = [
    pytest.param("bert", "lora", {"train": ["classifier"]}, id="bert-lora"),
    pytest.param("bert", "bitfit", {}, id="bert-bitfit"),
    pytest.param("bert", "adalora", {"train": ["classifier"], "target_rank": 4}, id="bert-adalora"),
    pytest.param("llama", "lora", {"target": "all-linear"}, id="llama-lora"),
    pytest.param("llama", "bitfit", {"add_missing_bias": True}, id="llama-bitfit"),
    pytest.param("llama", "adalora", {"target_rank": 4}, id="llama-adalora"),
    pytest.param("moe", "lora", {"target": "all-linear"}, id="moe-lora"),
]


def adapted(name: str, method: str, options: dict[str, Any]) -> tuple[nn.Module, peftcore.Injection, Any]:
    """A host, its injection and, as the Trainer wants them, its optimizer and no scheduler."""
    model = host(name)
    injection = peftcore.apply(model, method, seed=0, **options)
    return model, injection, (injection.optimizer(torch.optim.AdamW, lr=0.05), None)


def copied(injection: peftcore.Injection) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in injection.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the bit."""
    assert actual.keys() == expected.keys()
    assert [key for key, value in actual.items() if not torch.equal(value, expected[key])] == []


@pytest.mark.parametrize(("name", "method", "options"), CASES)
def test_resumed_training_ends_where_the_uninterrupted_one_does(
    name: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Dropout, the order of rows, moments, schedules and statistics go on where they were."""
    model, whole, optimizers = adapted(name, method, options)
    start = copied(whole)
    trainer(model, name, tmp_path, [PeftcoreCallback()], optimizers=optimizers).train()
    resumed_model, resumed, optimizers = adapted(name, method, options)
    run = trainer(resumed_model, name, tmp_path, [PeftcoreCallback()], optimizers=optimizers)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert run.state.global_step == STEPS
    assert_same(copied(resumed), copied(whole))
    assert any(not torch.equal(value, start[key]) for key, value in whole.state_dict().items())


def test_resuming_with_the_trainers_own_optimizer_is_exact_too(tmp_path: Path) -> None:
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model, injection, _ = adapted("bert", "lora", {})
        trainer(model, "bert", tmp_path, [PeftcoreCallback()]).train(resume_from_checkpoint=checkpoint)
        results.append(copied(injection))
    assert_same(*results)


@pytest.mark.parametrize(("name", "method", "options"), CASES)
def test_checkpoints_hold_the_adapter_and_nothing_of_the_frozen_base(
    name: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, injection, optimizers = adapted(name, method, options)
    base = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    trainer(model, name, tmp_path, [PeftcoreCallback()], optimizers=optimizers).train()
    for step in (3, STEPS):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert not base.intersection(saved)
        assert len(saved) == len(injection.state_dict())
        held = sum(value.nbytes for value in injection.state_dict().values())
        assert (tmp_path / f"checkpoint-{step}" / "model.safetensors").stat().st_size < held + 20_000
    last = sorted(value.sum().item() for value in load_file(tmp_path / "checkpoint-6" / "model.safetensors").values())
    assert last == sorted(value.sum().item() for value in injection.state_dict().values())


def test_checkpoints_do_not_grow_with_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    big = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50_000, **sizes))
    injection = peftcore.apply(big, "lora")
    trainer(big, "llama", tmp_path, [PeftcoreCallback()]).train()
    files = [path for path in (tmp_path / "checkpoint-6").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60_000
    assert sum(parameter.numel() for parameter in big.parameters()) > 1_500_000
    assert len(injection.operators) == 4


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_final_model_is_the_clean_base(name: str, tmp_path: Path) -> None:
    base = {key: value.clone() for key, value in host(name).state_dict().items()}
    model, injection, optimizers = adapted(name, "lora", {})
    run = trainer(model, name, tmp_path / "run", [PeftcoreCallback()], optimizers=optimizers)
    run.train()
    run.save_model(str(tmp_path / "final"))
    loaded, info = type(model).from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert_same(dict(loaded.state_dict()), base)
    injection.save(tmp_path / "adapter")
    peftcore.load(loaded, tmp_path / "adapter")
    batch = {key: value[None] for key, value in rows(name)[0].items()}
    # not to the bit: tensors mapped from a file lie at any address, and how torch rounds depends on that
    torch.testing.assert_close(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


def test_training_again_writes_checkpoints_again(tmp_path: Path) -> None:
    """The first training ends with the adapters left out of what is saved."""
    model, injection, _ = adapted("bert", "lora", {})
    for part in ("first", "second"):
        trainer(model, "bert", tmp_path / part, [PeftcoreCallback()]).train()
        assert len(load_file(tmp_path / part / "checkpoint-6" / "model.safetensors")) == len(injection.state_dict())


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_the_best_checkpoint_is_loaded_at_the_end(method: str, tmp_path: Path) -> None:
    chosen = set()
    for greater in (False, True):  # either the first or the last is the best by one of the two
        folder = tmp_path / str(greater)
        model, injection, optimizers = adapted("bert", method, {})
        changes = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
        changes |= {"metric_for_best_model": "loss", "greater_is_better": greater}
        run = trainer(model, "bert", folder, [PeftcoreCallback()], optimizers=optimizers, **changes)
        run.train()
        best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
        now = {key: value for key, value in model.state_dict().items() if key in best}
        assert len(best) == len(injection.state_dict())
        assert_same(now, best)
        chosen.add(Path(run.state.best_model_checkpoint).name)
    assert chosen == {"checkpoint-3", "checkpoint-6"}


def test_only_the_best_is_saved_on_request(tmp_path: Path) -> None:
    """With save_strategy="best", the Trainer decides between evaluation and checkpoint."""
    model, _, optimizers = adapted("bert", "lora", {})
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "loss"}
    run = trainer(model, "bert", tmp_path, [PeftcoreCallback()], optimizers=optimizers, **changes)
    run.train()
    saved = sorted(tmp_path.glob("checkpoint-*"))
    assert saved
    for folder in saved:
        assert all(".peft." in key for key in load_file(folder / "model.safetensors"))


def test_a_checkpoint_loads_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys that are missing because the base was left out."""
    warned: list[str] = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda text, *args: warned.append(str(text)))
    changes = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model, _, optimizers = adapted("bert", "lora", {})
        run = trainer(model, "bert", tmp_path, [PeftcoreCallback()], optimizers=optimizers, **changes)
        run.train(resume_from_checkpoint=checkpoint)
    assert not [text for text in warned if "missing" in text or "unexpected" in text]


def test_steps_are_taken_where_the_optimizer_is_the_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, bool]] = []

    def spy(self: Any, injection: peftcore.Injection, step: int, total: int) -> None:
        seen.append((step, total, all(parameter.grad is not None for parameter in injection.parameters())))

    monkeypatch.setattr(peftcore.method("adalora"), "on_step", spy)
    model, _, _ = adapted("bert", "adalora", {})
    trainer(model, "bert", tmp_path, [PeftcoreCallback()], gradient_accumulation_steps=2).train()
    assert seen == [(step, STEPS, True) for step in range(1, STEPS + 1)]


def test_steps_are_taken_once_where_the_optimizer_is_the_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        peftcore.method("adalora"), "on_step", lambda self, injection, step, total: seen.append((step, total))
    )
    model, _, optimizers = adapted("bert", "adalora", {})
    trainer(model, "bert", tmp_path, [PeftcoreCallback()], optimizers=optimizers).train()
    assert seen == [(step, STEPS) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("own", [True, False], ids=["the method's optimizer", "the Trainer's"])
def test_a_schedule_that_needs_more_steps_is_refused_before_the_first(own: bool, tmp_path: Path) -> None:
    model, injection, optimizers = adapted("bert", "adalora", {"final": STEPS})
    before = {key: value.clone() for key, value in injection.state_dict().items()}
    with pytest.raises(TrainingError, match=f"leave none of the {STEPS} steps"):
        trainer(model, "bert", tmp_path, [PeftcoreCallback()], **({"optimizers": optimizers} if own else {})).train()
    assert all(torch.equal(value, before[key]) for key, value in injection.state_dict().items())


def test_an_evaluation_before_training_changes_nothing(tmp_path: Path) -> None:
    """The counter of its draws is in the checkpoint that is read after it."""
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model, injection, _ = adapted("bert", "adapterdrop", {"robust": True, "drop_first_layers": 1})
        hooks = [*model._load_state_dict_pre_hooks], [*model._load_state_dict_post_hooks]
        run = trainer(model, "bert", tmp_path, [PeftcoreCallback()])
        run.evaluate()
        run.train(resume_from_checkpoint=checkpoint)
        results.append(copied(injection))
    assert_same(*results)
    assert ([*model._load_state_dict_pre_hooks], [*model._load_state_dict_post_hooks]) == hooks


def test_frozen_injections_take_no_steps(tmp_path: Path) -> None:
    model, first, _ = adapted("bert", "adalora", {"name": "first"})
    first.trainable(False)
    before = copied(first)
    second = peftcore.apply(model, "lora")
    trainer(model, "bert", tmp_path, [PeftcoreCallback()]).train()
    assert_same(copied(first), before)
    assert all(parameter.requires_grad for parameter in second.parameters())


def test_a_schedule_without_its_callback_is_an_error(tmp_path: Path) -> None:
    model, _, optimizers = adapted("bert", "adalora", {})
    with pytest.raises(TrainingError, match="PeftcoreCallback"):
        trainer(model, "bert", tmp_path, [], optimizers=optimizers).train()


def test_a_gradient_rule_wants_the_methods_optimizer(tmp_path: Path) -> None:
    model, _, _ = adapted("bert", "galore", {"target": "query", "rank": 2})
    with pytest.raises(TrainingError, match=r"injection\.optimizer"):
        trainer(model, "bert", tmp_path, [PeftcoreCallback()]).train()
    model, injection, optimizers = adapted("bert", "galore", {"target": "query", "rank": 2})
    trainer(model, "bert", tmp_path, [PeftcoreCallback()], optimizers=optimizers).train()
    assert isinstance(optimizers[0], MethodOptimizer)
    shapes = {tuple(state["exp_avg"].shape) for state in optimizers[0].state.values()}
    assert shapes == {(16, 2)}
    assert injection.summary().irregular == ()


def after_a_run(model: nn.Module) -> dict[str, Any]:
    """A trace without what the first forward and every Trainer change: the witness leaves, accelerate's mark."""
    with torch.no_grad():
        model(input_ids=rows("bert")[0]["input_ids"][None])
    model._is_accelerate_prepared = True
    return trace(model)


class Broken(Exception):
    pass


def break_training(run: transformers.Trainer) -> None:
    run.train_dataset = None
    run.get_train_dataloader = lambda: _breaks_at(run, 4)


class _breaks_at:
    def __init__(self, run: transformers.Trainer, step: int) -> None:
        self.batches = list(transformers.Trainer.get_eval_dataloader(run))
        self.step = step

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        for _ in range(self.step):
            yield self.batches[0]
        raise Broken


def break_evaluation(run: transformers.Trainer) -> None:
    def metrics(prediction: Any) -> dict[str, float]:
        raise Broken

    run.compute_metrics = metrics


def break_saving(run: transformers.Trainer) -> None:
    def fail(output_dir: str) -> None:
        raise Broken

    run._save_optimizer_and_scheduler = fail


def want_another_metric(run: transformers.Trainer) -> None:
    run.args.metric_for_best_model = "unheard_of"


@pytest.mark.parametrize(
    ("spoil", "error"),
    [(break_training, Broken), (break_evaluation, Broken), (break_saving, Broken), (want_another_metric, KeyError)],
)
def test_nothing_stays_on_the_model_when_training_fails(
    spoil: Callable[[transformers.Trainer], None], error: type[Exception], tmp_path: Path
) -> None:
    model, _, optimizers = adapted("bert", "lora", {})
    before, keys = after_a_run(model), set(model._keys_to_ignore_on_save or ())
    changes = {"eval_strategy": "steps", "eval_steps": 3}
    run = trainer(model, "bert", tmp_path, [PeftcoreCallback()], optimizers=optimizers, **changes)
    spoil(run)
    with pytest.raises(error):
        run.train()
    wrong = differences(before, trace(model), passing=("values", "training"))
    run.save_model(str(tmp_path / "after"))
    saved = set(load_file(tmp_path / "after" / "model.safetensors"))
    assert wrong == ""
    assert set(model._keys_to_ignore_on_save or ()) == keys
    assert saved >= {key for key, parameter in model.named_parameters() if not parameter.requires_grad}


def test_nothing_stays_on_the_model_when_training_ends(tmp_path: Path) -> None:
    """But the way in which it is saved: `test_checkpoints` has what that does."""
    model, _, optimizers = adapted("bert", "lora", {})
    before, keys = after_a_run(model), set(model._keys_to_ignore_on_save or ())
    trainer(model, "bert", tmp_path, [PeftcoreCallback()], optimizers=optimizers).train()
    assert differences(before, trace(model), passing=("values", "training")) == ""
    assert set(model._keys_to_ignore_on_save or ()) == keys


def test_where_nothing_trains_the_first_step_is_refused(tmp_path: Path) -> None:
    """An adapter that `load` left frozen."""
    _, injection, _ = adapted("bert", "lora", {})
    injection.save(tmp_path / "adapter")
    other = host("bert")
    loaded = peftcore.load(other, tmp_path / "adapter")
    made = trainer(other, "bert", tmp_path, [PeftcoreCallback()])
    with pytest.raises(TrainingError, match=r"'lora' is frozen.*injection\.trainable\(\)"):
        made.train()
    loaded.trainable()
    made = trainer(other, "bert", tmp_path, [PeftcoreCallback()])
    made.train()
    assert made.state.global_step == STEPS


def test_hosts_that_are_not_transformers_own_get_small_checkpoints_too(tmp_path: Path) -> None:
    class Loss(nn.Module):
        """A bare module with the loss that the Trainer asks for."""

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 64)
            self.down = nn.Linear(64, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.down(torch.tanh(self.up(x)))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.randn(4), "labels": torch.tensor(index % 3)} for index in range(12)]
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        torch.manual_seed(0)
        model = Loss()
        injection = peftcore.apply(model, "lora", target=["up", "down"], rank=2)
        run = trainer(model, "bert", tmp_path, [PeftcoreCallback()], label_names=["labels"])
        run.train_dataset = data
        run.train(resume_from_checkpoint=checkpoint)
        results.append(copied(injection))
    assert_same(*results)
    assert len(load_file(tmp_path / "checkpoint-6" / "model.safetensors")) == len(injection.state_dict())


class Frame(nn.Module):
    """Holds an adapted model as one of its parts, as models of losses and of rewards do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss}


def test_the_adapted_model_may_be_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of its schedule are taken, and its checkpoints are small and resume."""
    taken: list[int] = []
    monkeypatch.setattr(peftcore.method("adalora"), "on_step", lambda self, _, step, total: taken.append(step))
    model, _, _ = adapted("bert", "adalora", {})
    trainer(Frame(model), "bert", tmp_path / "plain", [PeftcoreCallback()]).train()
    assert taken == list(range(1, STEPS + 1))
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model, injection, optimizers = adapted("bert", "adalora", {})
        run = trainer(Frame(model), "bert", tmp_path, [PeftcoreCallback()], optimizers=optimizers)
        run.train(resume_from_checkpoint=checkpoint)
        assert len(load_file(tmp_path / "checkpoint-3" / "model.safetensors")) == len(injection.state_dict())
        results.append(copied(injection))
    assert_same(*results)
