"""Layers that run again inside backward see what their forward saw, whatever was left or chosen since."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_toys import Checkpointed, TaskMethod, fill, gradients, host
from core_toys import token_ids
from torch import Tensor, nn

import peftcore
from peftcore import Injection, activate, call, route
from peftcore.errors import AmbiguousBackward, TrainingError
from peftcore.forward.context.context import HERE, drop_interrupted, graph_task, repeating

MODES = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
Choose = Callable[[Checkpointed], object]

CHOICES: dict[str, Choose] = {
    "one": lambda model: activate(model, "one"),
    "other": lambda model: activate(model, "two"),
    "both": lambda model: activate(model, "one", "two"),
    "route": lambda model: route(model, ["two", None, "one"]),
    "context": lambda model: call(model, strength=2.0),
}


def adapted(reentrant: bool | None, nested: bool = False) -> tuple[Checkpointed, list[Injection]]:
    model = host(reentrant, nested)
    one = peftcore.apply(model, "lora", name="one", target="all-linear")
    two = peftcore.apply(model, "dora", name="two", target="all-linear")
    tasks = peftcore.apply(model, TaskMethod, name="tasks")
    for index, injection in enumerate((one, two, tasks)):
        fill(injection, index)
    call(model, strength=0.5)
    activate(model, "tasks")
    return model, [one, two, tasks]


def loss(model: Checkpointed, choose: Choose, seed: int = 0) -> Tensor:
    """The loss under a choice that is left before it is returned."""
    ids = (token_ids(3) + seed) % 11
    with choose(model):  # type: ignore[attr-defined]
        output = model(ids, labels=ids.roll(1, 1))
    return output["loss"]


def test_graph_task_is_a_number_inside_backward_only() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = (x * 2).sum()
    y.register_hook(lambda gradient: seen.append((graph_task(), repeating())))
    assert graph_task() == -1 and not repeating()
    y.backward()
    (x * 3).sum().backward()
    assert len(seen) == 1 and seen[0][0] >= 0 and seen[0][1]
    assert graph_task() == -1 and not repeating()


@MODES
@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_left_before_backward_changes_no_gradient(choice: str, reentrant: bool) -> None:
    plain, checkpointed = adapted(None), adapted(reentrant)
    results = []
    for model, injections in (plain, checkpointed):
        value = loss(model, CHOICES[choice])
        with activate(model), call(model, strength=100.0):
            value.backward()
        results.append(gradients(*injections))
    assert sum(gradient.abs().sum() for gradient in results[0]) > 0.1
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@MODES
@pytest.mark.parametrize(("first", "second"), [("one", "other"), ("route", "both"), ("context", "one")])
def test_two_differing_forwards_before_one_backward(first: str, second: str, reentrant: bool) -> None:
    plain, checkpointed = adapted(None), adapted(reentrant)
    results = []
    for model, injections in (plain, checkpointed):
        total = 3 * loss(model, CHOICES[first]) + loss(model, CHOICES[second], seed=1)
        total.backward()
        results.append(gradients(*injections))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    alone = []
    for choice, seed, factor in ((first, 0, 3), (second, 1, 1)):
        (factor * loss(plain[0], CHOICES[choice], seed)).backward()
        alone.append(gradients(*plain[1]))
    for one, two, both in zip(*alone, results[1], strict=True):
        torch.testing.assert_close(one + two, both, rtol=1e-5, atol=1e-6)


@MODES
def test_forwards_go_backward_in_any_order(reentrant: bool) -> None:
    plain, checkpointed = adapted(None), adapted(reentrant)
    results = []
    for model, injections in (plain, checkpointed):
        early, late = loss(model, CHOICES["one"]), loss(model, CHOICES["other"])
        early.backward()
        between = loss(model, CHOICES["route"])
        late.backward()
        between.backward()
        results.append(gradients(*injections))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@MODES
def test_backward_in_another_thread(reentrant: bool) -> None:
    """As on a GPU, where torch runs backward in a thread of the device."""
    plain, checkpointed = adapted(None), adapted(reentrant)
    results = []
    for model, injections in (plain, checkpointed):
        value = loss(model, CHOICES["one"])
        thread = threading.Thread(target=value.backward)
        thread.start()
        thread.join()
        results.append(gradients(*injections))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def trunk_loss(model: Checkpointed, choose: Choose, seed: int = 0) -> Tensor:
    with choose(model):  # type: ignore[attr-defined]
        return model.trunk((token_ids(3) + seed) % 11).square().mean()


@MODES
def test_a_part_of_the_host_called_by_itself(reentrant: bool) -> None:
    """No output of the host announces the backward: the checkpoint tells."""
    plain, checkpointed = adapted(None), adapted(reentrant)
    results = []
    for model, injections in (plain, checkpointed):
        for choice in ("one", "other"):
            trunk_loss(model, CHOICES[choice]).backward()
        results.append(gradients(*injections))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    results = []
    for model, injections in (plain, checkpointed):
        (trunk_loss(model, CHOICES["one"]) + trunk_loss(model, CHOICES["other"], seed=1)).backward()
        results.append(gradients(*injections))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


class Homemade(torch.autograd.Function):
    """A checkpoint as some libraries have of their own: nothing of torch's tells which forward it repeats."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run, ctx.x = run, x
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.run(x)
        torch.autograd.backward(output, gradients[0])
        return None, x.grad


def test_a_checkpoint_of_another_library() -> None:
    """One choice is enough to know, two are an error."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for name in ("one", "other"):
        fill(peftcore.apply(model, "lora", target="0", rank=2, name=name), 1)

    def loss_of_part(name: str) -> Tensor:
        with activate(model, name):
            output: Tensor = Homemade.apply(model[0], torch.ones(1, 4, requires_grad=True))
        return output.square().sum()

    loss_of_part("one").backward()
    total = loss_of_part("one") + loss_of_part("other")
    with pytest.raises(AmbiguousBackward, match="several forwards"):
        total.backward()
    loss_of_part("one").backward()


@MODES
def test_nested_checkpoints(reentrant: bool) -> None:
    plain, nested = adapted(None), adapted(reentrant, nested=True)
    results = []
    for model, injections in (plain, nested):
        loss(model, CHOICES["one"]).backward()
        results.append(gradients(*injections))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    results = []
    for model, injections in (plain, nested):
        (loss(model, CHOICES["one"]) + loss(model, CHOICES["other"], seed=1)).backward()
        results.append(gradients(*injections))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@MODES
def test_losses_of_operators_count_once(reentrant: bool) -> None:
    from call_toys import TapMethod

    results = []
    for model in (host(None), host(reentrant)):
        injection = peftcore.apply(model, TapMethod)
        fill(injection, 5)
        ids = token_ids(3)
        if reentrant and results:  # a loss made inside a reentrant checkpoint has no graph: its gradient would be lost
            with pytest.raises(TrainingError, match="a checkpointed block adds a loss of the adapter"):
                model(ids, labels=ids)
            return
        output = model(ids, labels=ids)["loss"]
        output.backward()
        results.append([output.detach(), *gradients(injection)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_records_die_with_their_graphs() -> None:
    model, _ = adapted(False)
    seen: list[weakref.ref[peftcore.author.ForwardContext]] = []
    model.norm.register_forward_hook(lambda *_: seen.append(weakref.ref(peftcore.author.forward_context())))
    value = loss(model, CHOICES["one"])
    assert seen[0]() is not None
    value.backward()
    del value
    assert seen[0]() is None


def test_hosts_of_transformers_with_their_own_checkpointing() -> None:
    from peftcore.testing.hosts import HOSTS

    for name in ("llama", "bert", "gpt2", "t5"):
        results = []
        for reentrant in (None, False, True):
            torch.manual_seed(0)
            model, inputs = HOSTS[name].build()
            one = peftcore.apply(model, "lora", name="one", target="all-linear")
            two = peftcore.apply(model, "dora", name="two", target="all-linear")
            fill(one, 1), fill(two, 2)
            model.train()
            if reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            torch.manual_seed(0)
            rows = (["one", "two", None] * 3)[: len(next(iter(inputs.values())))]
            with route(model, rows):
                output = HOSTS[name].output(model(**inputs))
            with activate(model):
                output.square().mean().backward()
            results.append(gradients(one, two))
        assert sum(gradient.abs().sum() for gradient in results[0]) > 1e-4
        for actual in results[1:]:
            for gradient, expected in zip(actual, results[0], strict=True):
                if name == "t5":  # its decoder layers add up gradients of the encoder in another order, adapted or not
                    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
                else:
                    assert torch.equal(gradient, expected), name


def test_an_interrupt_at_the_end_of_a_forward_leaves_no_forward_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the forward's context was closed, and before the forward around it is found again."""
    model = nn.Sequential(nn.Linear(4, 4))
    peftcore.apply(model, "lora", target="0")

    def interrupted() -> None:
        if HERE.calm is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HERE, "settle", interrupted)
        model(torch.ones(1, 4))
    assert HERE.calls == [] and HERE.calm is not None
    drop_interrupted()
    assert HERE.calm is None
