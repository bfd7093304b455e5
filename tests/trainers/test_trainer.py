"""The Trainer with a loss that is not the model's: methods' own losses are in it, once a step, as in a sum by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from training_hosts import arguments, host, rows

import peftcore
from peftcore.errors import TrainingError
from peftcore.training import PeftcoreCallback, PeftcoreTrainer

Gradients = dict[str, Tensor]


def adapted(name: str, weight: float = 3.0) -> tuple[nn.Module, peftcore.Injection]:
    """A host without dropout, with a method that has a loss of its own, of this weight."""
    model = host(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    injection = peftcore.apply(model, "adalora", orthogonality=weight, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, injection


class Noted(transformers.TrainerCallback):
    """Notes the gradients of the first step, before they are clipped or used."""

    def __init__(self, injection: peftcore.Injection) -> None:
        self.injection = injection
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if not self.gradients:
            self.gradients = noted(self.injection)


def noted(injection: peftcore.Injection) -> Gradients:
    named = ((f"{path}.{name}", p) for path, each in injection.modules() for name, p in each.named_parameters())
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def trained(
    kind: type, name: str, folder: Path, wrap: Callable[[nn.Module], nn.Module], weight: float = 3.0, **changes: Any
) -> Gradients:
    """Gradients of one step of a Trainer."""
    model, injection = adapted(name, weight)
    watch = Noted(injection)
    loss = {key: changes.pop(key) for key in ("compute_loss_func",) if key in changes}
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.0, total_steps=300)
    options = {"max_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    kind(
        wrap(model),
        arguments(folder, **{**options, **changes}),
        train_dataset=rows(name),
        callbacks=[watch] if issubclass(kind, PeftcoreTrainer) else [PeftcoreCallback(), watch],
        optimizers=(optimizer, None),
        **loss,
    ).train()
    return watch.gradients


def by_hand(name: str, loss: Callable[[Any, Tensor], Tensor], batches: int) -> Gradients:
    """Gradients of the mean over batches, and once the method's own loss."""
    model, injection = adapted(name)
    model.train()
    data = rows(name)
    total: Any = 0.0
    for batch in range(batches):
        inputs = {key: torch.stack([row[key] for row in data[2 * batch : 2 * batch + 2]]) for key in data[0]}
        labels = inputs.pop("labels")
        total = total + loss(model(**inputs), labels) / batches
        injection.losses()
    own = injection.method.aux_loss(injection)
    assert own is not None and own > 0.01
    (total + own).backward()
    return noted(injection)


def smoothed(logits: Tensor, labels: Tensor, factor: float = 0.1) -> Tensor:
    """What transformers calls label smoothing."""
    logs = logits.log_softmax(-1)
    kept = labels.ne(-100)
    nll = -logs.gather(-1, labels.clamp_min(0)[..., None])[..., 0][kept].mean()
    return (1 - factor) * nll + factor * -logs.mean(-1)[kept].mean()


def same(output: nn.Module) -> nn.Module:
    return output


class Tuple(nn.Module):
    """Calls a model for tuples."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels, return_dict=False)


class TupleOfTokens(Tuple):
    """Calls a language model for tuples, whose loss is a sum over the tokens of the step by their number."""

    loss_type = "ForCausalLM"  # by this, the Trainer counts tokens that are predicted

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **more: Any) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels, return_dict=False, **more)


def for_tuples(model: Any) -> nn.Module:
    model.config.return_dict, model.accepts_loss_kwargs = False, False  # its loss is a mean, though it takes all names
    return model


def cross_entropy(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's own, for `compute_loss_func`."""
    logits = output.logits if isinstance(output, dict) else output[0]
    if num_items_in_batch is None:
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch


CASES = {
    "smoothing": ("bert", same, {"label_smoothing_factor": 0.1}, lambda out, y: smoothed(out.logits, y)),
    "smoothing, tokens": (
        "llama",
        same,
        {"label_smoothing_factor": 0.1},
        lambda out, y: smoothed(out.logits[:, :-1], y[:, 1:]),
    ),
    "function": ("bert", same, {"compute_loss_func": cross_entropy}, lambda out, y: cross_entropy(out, y)),
    "tuples": ("bert", for_tuples, {}, lambda out, y: cross_entropy(out, y)),
    "tuples, tokens": ("llama", TupleOfTokens, {}, lambda out, y: cross_entropy((out[0][:, :-1],), y[:, 1:])),
    "a part": ("bert", Tuple, {}, lambda out, y: cross_entropy(out, y)),
}


TUPLES = ("tuples", "tuples, tokens", "a part")
"""The cases in which the model computes its loss and returns it in front of a tuple."""


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_a_sum_by_hand(case: str, batches: int, tmp_path: Path) -> None:
    name, wrap, changes, loss = CASES[case]

    def wanted_loss(output: Any, labels: Tensor) -> Tensor:
        found: Tensor = loss(output, labels)
        return found

    options = {"gradient_accumulation_steps": batches, **changes}
    found = trained(PeftcoreTrainer, name, tmp_path, wrap, **options)
    wanted = by_hand(name, wanted_loss, batches)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if "tokens" in case])
def test_they_count_once_where_batches_have_unlike_numbers_of_labels(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the gradients of a step with and without the own loss, the difference is that of the own loss."""
    name, wrap, changes, _ = CASES[case]
    data = rows(name)
    for index, row in enumerate(data):
        row["labels"] = row["labels"].masked_fill(torch.arange(5) > index + 1, -100)
    monkeypatch.setitem(globals(), "rows", lambda name: data)
    with_own, without = (
        trained(PeftcoreTrainer, name, tmp_path, wrap, weight, gradient_accumulation_steps=2, **changes)
        for weight in (3.0, 0.0)
    )
    _, injection = adapted(name)
    own = injection.method.aux_loss(injection)
    assert own is not None
    own.backward()
    difference = {key: value - without[key] for key, value in with_own.items()}
    torch.testing.assert_close(difference, noted(injection), rtol=1e-3, atol=1e-4)


def test_they_count_once_where_batches_have_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss function says itself what part of a step a batch is; the own loss is divided by the number of batches."""

    def half(output: Any, labels: Any = None, num_items_in_batch: Any = None) -> Tensor:
        found: Tensor = output.logits.square().mean() / 2
        return found

    wanted = by_hand("bert", lambda out, y: 2 * half(out), 2)
    unlabelled = [{key: value for key, value in row.items() if key != "labels"} for row in rows("bert")]
    monkeypatch.setitem(globals(), "rows", lambda name: unlabelled)
    found = trained(
        PeftcoreTrainer, "bert", tmp_path, same, compute_loss_func=half, gradient_accumulation_steps=2, label_names=[]
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_in_a_compiled_model_they_count_once(tmp_path: Path) -> None:
    torch.compiler.reset()
    name, wrap, changes, loss = CASES["smoothing"]
    options = {"gradient_accumulation_steps": 2, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    found = trained(PeftcoreTrainer, name, tmp_path, wrap, **options, **changes)
    torch.testing.assert_close(found, by_hand(name, loss, 2), rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


def test_losses_that_the_user_has_added_are_not_added_again(tmp_path: Path) -> None:
    """In a loss function of their own, with the callback alone and with our Trainer."""
    name, wrap, _, loss = CASES["function"]
    wanted = by_hand(name, loss, 1)

    def with_own(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        [injection] = peftcore.injections(models[0]).values()
        return cross_entropy(output, labels, num_items_in_batch) + injection.losses()

    for kind in (transformers.Trainer, PeftcoreTrainer):
        models: list[nn.Module] = []

        def seen(model: nn.Module, models: list[nn.Module] = models) -> nn.Module:
            models.append(model)
            return wrap(model)

        found = trained(kind, name, tmp_path, seen, compute_loss_func=with_own)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_it_is_the_first_base_class_of_another_trainer(tmp_path: Path) -> None:
    class Doubled(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *more: Any, **named: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True, *more, **named)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    class Mine(PeftcoreTrainer, Doubled):
        pass

    name, wrap, changes, loss = CASES["smoothing"]
    found = trained(Mine, name, tmp_path, wrap, **changes)
    torch.testing.assert_close(found, by_hand(name, lambda out, y: 2 * loss(out, y), 1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("case", TUPLES)
def test_a_plain_trainer_gets_them_in_the_loss_of_a_tuple(case: str, batches: int, tmp_path: Path) -> None:
    name, wrap, changes, _ = CASES[case]
    with_own = trained(transformers.Trainer, name, tmp_path, wrap, gradient_accumulation_steps=batches, **changes)
    wanted = trained(PeftcoreTrainer, name, tmp_path, wrap, gradient_accumulation_steps=batches, **changes)
    without = trained(transformers.Trainer, name, tmp_path, wrap, 0.0, gradient_accumulation_steps=batches, **changes)
    torch.testing.assert_close(with_own, wanted)
    assert not all(torch.allclose(each, without[key], atol=1e-3) for key, each in with_own.items())


@pytest.mark.parametrize("case", [each for each in CASES if each not in TUPLES])
def test_a_plain_trainer_is_refused_before_it_changes_anything(case: str, tmp_path: Path) -> None:
    name, wrap, changes, _ = CASES[case]
    with pytest.raises(TrainingError, match="PeftcoreTrainer"):
        trained(transformers.Trainer, name, tmp_path, wrap, **changes)
