"""Losses that methods add are never lost: where the output has no loss they wait, once, until somebody takes them."""

import copy
import dataclasses
import gc
import io
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from call_toys import Reader, TapMethod, TwiceMethod, fill, gradients, host, in_a_thread
from core_toys import token_ids
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore import activate
from peftcore.forward.state import own_losses
from peftcore.forward.state.host_state import state_of
from peftcore.testing.hosts import HOSTS


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has given no notice yet."""
    monkeypatch.setattr(own_losses, "told", set())


def sequential() -> tuple[nn.Module, peftcore.Injection, Tensor]:
    """A host that returns a tensor, with a method that has a loss of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).train()
    injection = peftcore.apply(model, "adalora", target=["0", "2"], orthogonality=100.0)
    fill(injection, 1)
    return model, injection, torch.randn(5, 4)


def adapted(*methods: Any) -> tuple[nn.Module, list[peftcore.Injection]]:
    """A seeded transformer, in training mode, with these methods."""
    model = host()
    injections = [peftcore.apply(model, method, name=f"m{index}") for index, method in enumerate(methods)]
    for index, injection in enumerate(injections):
        fill(injection, index)
    return model, injections


def by_hand(injection: peftcore.Injection) -> Tensor:
    """The method's loss, asked for by its name."""
    loss = injection.method.aux_loss(injection)
    assert loss is not None
    return loss


def test_in_a_loop_the_gradients_are_those_of_a_sum_by_hand() -> None:
    model, injection, x = sequential()
    (model(x).square().mean() + by_hand(injection)).backward()
    wanted = gradients(injection)
    injection.losses()
    (model(x).square().mean() + injection.losses()).backward()
    torch.testing.assert_close(gradients(injection), wanted)
    model(x).square().mean().backward()
    assert not all(torch.allclose(a, b) for a, b in zip(gradients(injection), wanted, strict=True))


def test_losses_are_taken_once_and_only_those_of_forwards_that_train() -> None:
    model, injection, x = sequential()
    assert injection.losses() == 0 and injection.losses().shape == ()
    model(x)
    torch.testing.assert_close(injection.losses(), by_hand(injection))
    assert injection.losses() == 0
    with torch.no_grad():
        model(x)
    assert injection.losses() == 0
    model.eval()(x)
    assert injection.losses() == 0
    with injection.disabled():
        model.train()(x)
    assert injection.losses() == 0


def test_a_loss_of_the_output_takes_them_as_before() -> None:
    model = HOSTS["llama"].build()[0].train()
    injection = peftcore.apply(model, "adalora")
    ids = token_ids(2)
    named = model(input_ids=ids, labels=ids).loss
    assert injection.losses() == 0
    unnamed = model(input_ids=ids, labels=ids, return_dict=False)
    assert injection.losses() == 0 and isinstance(unnamed, tuple)
    torch.testing.assert_close(unnamed[0], named)
    with injection.disabled():
        bare = model(input_ids=ids, labels=ids, return_dict=False)[0]
    assert abs(named - bare) > 1e-3
    model(input_ids=ids, return_dict=False)
    torch.testing.assert_close(injection.losses(), by_hand(injection))
    model(input_ids=ids)
    torch.testing.assert_close(injection.losses(), by_hand(injection))


def extra(model: nn.Module, injection: peftcore.Injection, ids: Tensor, run: Callable[..., Any]) -> Tensor:
    """What the operators of `TapMethod` add in one forward."""
    inputs: list[Tensor] = []
    hooks = [
        layer.mlp.up_proj.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
        for layer in model.layers
    ]
    run(ids)
    for hook in hooks:
        hook.remove()
    readers = [operator for operator in injection.operators.values() if isinstance(operator, Reader)]
    return sum(((reader.gain * x).square().mean() for reader, x in zip(readers, inputs, strict=True)), torch.zeros(()))


def test_losses_of_operators_wait_too() -> None:
    model, [injection] = adapted(TapMethod)
    ids = token_ids(2)
    wanted = extra(model, injection, ids, model)
    torch.testing.assert_close(injection.losses(), wanted)
    assert wanted > 1e-3
    model(ids)
    injection.losses().backward()
    assert any(gradient.any() for gradient in gradients(injection))


def test_parts_that_run_by_themselves_leave_theirs() -> None:
    """Nothing tells where their forward ends, so all wait that came since the last were taken."""
    model, [injection] = adapted(TapMethod)
    ids = token_ids(2)
    wanted = extra(model, injection, ids, model.trunk)
    torch.testing.assert_close(injection.losses(), wanted)
    assert injection.losses() == 0
    model.trunk(ids)
    model.trunk(ids)
    torch.testing.assert_close(injection.losses(), 2 * wanted)
    model.eval().trunk(ids)
    with torch.no_grad():
        model.train().trunk(ids)
    assert injection.losses() == 0
    model, [injection] = adapted("adalora")
    model.trunk(ids)
    torch.testing.assert_close(injection.losses(), by_hand(injection))


def test_parts_whose_layers_run_again_in_backward_leave_theirs_once() -> None:
    model = host(reentrant=False)
    injection = peftcore.apply(model, TapMethod)
    fill(injection, 0)
    ids = token_ids(2)
    wanted = extra(model, injection, ids, model.trunk)
    injection.losses()
    model.trunk(ids).square().sum().backward()
    torch.testing.assert_close(injection.losses(), wanted)


@dataclasses.dataclass(frozen=True)
class Outputs:
    logits: Tensor
    loss: Tensor | None = None


class Named(NamedTuple):
    loss: Tensor | None
    logits: Tensor


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "mapping": (lambda loss, logits: {"loss": loss, "logits": logits}, lambda output: output["loss"]),
    "dataclass": (lambda loss, logits: Outputs(logits, loss), lambda output: output.loss),
    "named tuple": (Named, lambda output: output.loss),
    "tuple": (lambda loss, logits: (loss, logits, (logits, logits)), lambda output: output[0]),
}
"""How a host may return its loss, and where it is."""
WITHOUT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda loss, logits: logits,
    "scalar": lambda loss, logits: loss,
    "logits first": lambda loss, logits: (logits, loss),
    "nested": lambda loss, logits: ((loss, logits), logits),
    "list": lambda loss, logits: [loss, logits],
    "frozen mapping": lambda loss, logits: types.MappingProxyType({"loss": loss, "logits": logits}),
    "no loss": lambda loss, logits: Outputs(logits),
    "constant first": lambda loss, logits: (torch.zeros(()), logits),
}
"""What a host may return in which nobody can tell where a loss is that may be added to."""


class Returns(nn.Module):
    """Returns what it is told to make of its loss and its logits."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.first(x)
        return self.form(logits.square().mean(), logits)


def returning(form: Callable[[Tensor, Tensor], Any]) -> tuple[nn.Module, peftcore.Injection, Tensor]:
    model = Returns(form).train()
    injection = peftcore.apply(model, "adalora", target=["first"], orthogonality=100.0)
    fill(injection, 1)
    return model, injection, torch.randn(5, 4)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_an_output_of_any_form_takes_them(form: str) -> None:
    make, loss_of = FORMS[form]
    model, injection, x = returning(make)
    output = model(x, labels=torch.zeros(5))
    assert injection.losses() == 0
    logits = model.eval()(x)
    torch.testing.assert_close(loss_of(output), loss_of(logits) + by_hand(injection))
    assert type(output) is type(logits) and len(pytree.tree_leaves(output)) == len(pytree.tree_leaves(logits))


@pytest.mark.parametrize("form", WITHOUT)
def test_without_such_a_place_they_wait_and_a_notice_says_so(form: str, caplog: pytest.LogCaptureFixture) -> None:
    model, injection, x = returning(WITHOUT[form])
    model(x, labels=torch.zeros(5))
    torch.testing.assert_close(injection.losses(), by_hand(injection))
    assert not notices(caplog)
    model(x, labels=torch.zeros(5))
    model(x, labels=torch.zeros(5))
    assert len(notices(caplog)) == 1


def test_a_number_in_front_of_a_tuple_is_no_loss_where_nobody_asked_for_one() -> None:
    """A model without labels may begin with any number: a temperature, for one."""
    model, injection, x = returning(FORMS["tuple"][0])
    model(x)
    torch.testing.assert_close(injection.losses(), by_hand(injection))


def test_each_injection_gets_its_own() -> None:
    model, [first, taps] = adapted("adalora", TapMethod)
    second = peftcore.apply(model, "hra", name="second", orthogonality=0.1)
    fill(second, 4)
    ids = token_ids(2)
    operators = extra(model, taps, ids, model)
    assert operators > 1e-3
    taken = [each.losses() for each in (first, second, taps)]
    torch.testing.assert_close(taken, [by_hand(first), by_hand(second), operators])
    with activate(model, first.name):
        model(ids)
    with activate(model, second.name):
        model(ids)
    torch.testing.assert_close(first.losses(), by_hand(first))
    torch.testing.assert_close(second.losses(), by_hand(second))


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "left out of training" in record.getMessage()]


def test_one_notice_says_what_was_never_taken(caplog: pytest.LogCaptureFixture) -> None:
    model, injection, x = sequential()
    model(x)
    model(x)
    [notice] = notices(caplog)
    assert "'adalora'" in notice and "injection.losses()" in notice
    model(x)
    assert len(notices(caplog)) == 1
    assert {record.name for record in caplog.records} == {"peftcore"}
    torch.testing.assert_close(injection.losses(), by_hand(injection))  # of the last forward alone


def test_no_notice_where_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    model, injection, x = sequential()
    for _ in range(3):
        (model(x).sum() + injection.losses()).backward()
        with torch.no_grad():
            model(x)
        model.eval()(x)
        model.train()
    plain, [_] = adapted("lora")
    for _ in range(3):
        plain(token_ids(2))
    assert not notices(caplog)


def test_parts_get_a_notice_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    model, [injection] = adapted(TapMethod)
    ids = token_ids(2)
    for _ in range(own_losses.PASSES + 1):
        model.trunk(ids)
    assert len(notices(caplog)) == 1
    injection.losses()
    model, [injection] = adapted("adalora")
    for _ in range(3 * own_losses.PASSES):
        model.trunk(ids)
        injection.losses()
    assert len(notices(caplog)) == 1


def test_only_the_last_forward_is_held() -> None:
    """When the next one begins, not when it ends: two would need twice the memory."""
    model, [injection] = adapted(TapMethod)
    ids, held = token_ids(2), []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        held.append(weakref.ref(args[0]))

    model.layers[0].mlp.up_proj.register_forward_hook(note)
    alive: list[bool] = []
    model.layers[0].register_forward_pre_hook(lambda *_: alive.extend(each() is not None for each in held))
    for _ in range(2):
        model(ids)
        gc.collect()
        assert [each() is not None for each in held][-1]
    assert alive == [False]
    injection.losses()
    gc.collect()
    assert [each() is not None for each in held] == [False, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_round_the_host(reentrant: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What backward repeats adds nothing; what a reentrant one runs without gradients is lost, and said so."""
    model, injection, x = sequential()
    x.requires_grad_()
    (model(x).square().mean() + by_hand(injection)).backward()
    wanted = gradients(injection)
    injection.losses()
    for _ in range(2):
        output = checkpoint(model, x, use_reentrant=reentrant)
        (output.square().mean() + injection.losses()).backward()
        found = gradients(injection)
        assert injection.losses() == 0
        assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True)) is not reentrant
    assert len(notices(caplog)) == reentrant


def test_threads_do_not_take_each_others() -> None:
    model, injection, x = sequential()
    model(x)
    found: list[Tensor] = []
    in_a_thread(lambda: found.append(injection.losses().detach()))
    assert found == [torch.zeros(())]

    def train() -> None:
        model(x)
        barrier.wait()
        found.append(injection.losses().detach())

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=train) for _ in range(2)]
    with activate(model, injection.name):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.testing.assert_close(torch.stack(found[1:]), by_hand(injection).detach().expand(2))
    torch.testing.assert_close(injection.losses(), by_hand(injection))


def test_copies_and_pickles_begin_with_nothing() -> None:
    model, injection, x = sequential()
    model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        [copied] = peftcore.injections(other).values()
        assert copied.losses() == 0
        other(x)
        torch.testing.assert_close(copied.losses(), by_hand(copied))
    torch.testing.assert_close(injection.losses(), by_hand(injection))
    model(x)
    injection.remove()
    assert state_of(model) is None


def test_an_extra_pass_counts_once() -> None:
    """`without` runs a block twice, and the operators of others in it."""
    model, [twice, taps] = adapted(TwiceMethod, TapMethod)
    ids = token_ids(2)
    with activate(model, taps.name):
        model(ids)
        count = len(state_of(model).recorder.losses.take(state_of(model), taps.name))
    with peftcore.call(model, strength=1.0), activate(model, twice.name, taps.name):
        model(ids)
        assert len(state_of(model).recorder.losses.take(state_of(model), taps.name)) == count


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Graphs, as a backend of torch.compile gets them."""
    torch.compiler.reset()
    graphs: list[Any] = []
    yield graphs
    torch.compiler.reset()


def compiled(model: nn.Module, graphs: list[Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.slow
def test_compiled_losses_are_taken_from_one_graph(counted: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    model, injection, x = sequential()
    (model(x).square().mean() + by_hand(injection)).backward()
    wanted = gradients(injection)
    injection.losses()
    run = compiled(model, counted)
    for _ in range(4):
        (run(x).square().mean() + injection.losses()).backward()
        torch.testing.assert_close(gradients(injection), wanted)
    assert injection.losses() == 0
    assert len(counted) == 1
    assert not notices(caplog)


@pytest.mark.slow
def test_compiled_losses_that_nobody_takes_get_a_notice(counted: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    model, injection, x = sequential()
    run = compiled(model, counted)
    for _ in range(5):
        run(x).sum().backward()
    assert len(notices(caplog)) == 1
    assert len(counted) == 2
    injection.losses()
    injection.losses()
    model, [injection] = adapted(TapMethod)
    ids = token_ids(2)
    wanted = extra(model, injection, ids, model)
    injection.losses()
    run = compiled(model, counted)
    for _ in range(2):
        run(ids)
        torch.testing.assert_close(injection.losses(), wanted)


def test_a_loss_of_the_output_sees_it_and_what_went_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits before any loss was added, the inputs by name, what the call was told; with taps, of each adapter."""
    model = HOSTS["llama"].build()[0].train()
    injection = peftcore.apply(model, "lora")
    fill(injection, 1)
    ids, seen = token_ids(2), []

    def output_loss(self: Any, injection: peftcore.Injection, output: Any, call: Any) -> Tensor | None:
        seen.append((injection, call.inputs["input_ids"], call.open))
        return None if "weight" not in call.context else call.context["weight"] * output["logits"].square().mean()

    monkeypatch.setattr(type(injection.method), "output_loss", output_loss)
    logits = model(input_ids=ids).logits
    assert injection.losses() == 0 and len(seen) == 1
    assert seen[0][0] is injection and seen[0][1] is ids and seen[0][2]
    with peftcore.call(model, weight=3.0):
        model(ids)
        torch.testing.assert_close(injection.losses(), 3 * logits.square().mean())
        both = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(both, model(input_ids=ids, labels=ids).loss + 3 * logits.square().mean())
    before = len(seen)
    with torch.no_grad():
        model(ids)
    with injection.disabled():
        model(ids)
    model.eval()(ids)
    assert len(seen) == before
    both.backward()
    assert any(gradient.any() for gradient in gradients(injection))
