"""Equal operators of several adapters run as one: as each by itself, in few operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from call_toys import adapted, check_rows, fill, host, separately
from core_toys import token_ids
from torch import Tensor, nn

import peftcore
from peftcore import activate, route
from peftcore.forward.rows import stacked_operators
from peftcore.testing.tools import Counts


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters ran as one, run by run."""
    seen: list[int] = []
    inner = stacked_operators.as_one

    def noting(acting: Any, *args: Any) -> Callable[[], Tensor]:
        seen.append(len(acting))
        return inner(acting, *args)

    monkeypatch.setattr("peftcore.forward.call.as_one", noting)
    return seen


METHODS = ["pissa", "vera", "ia3", "lora_xs", "houlsby_adapter", "bitfit", "ln_tuning", "ssf", "compacter"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 1, -1, 0, 2, -1)])
def test_equal_adapters_run_as_one_and_as_each_by_itself(
    method: str, order: tuple[int, ...], groups: list[int]
) -> None:
    model, injections = adapted(*[method] * 4)
    check_rows(model, injections, [None if n < 0 else injections[n].name for n in order])
    assert groups and set(groups) == {4}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["pissa", "vera", "ia3", "houlsby_adapter"])
def test_adapters_of_layers_in_a_sequential_run_as_one(method: str, training: bool, groups: list[int]) -> None:
    """Their adapter modules are inside of the layers, which are no less single layers for that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)).double().train(training)
    for name in "abc":
        injection = peftcore.apply(model, method, target=["0", "1"], name=name, dtype="float64")
        for parameter in injection.parameters():
            parameter.data.normal_(0, 0.1)
    x, expected = torch.randn(3, 4, 8).double(), []
    for row, name in enumerate("abc"):
        activate(model, name)
        expected.append(model(x[row : row + 1]))
    with route(model, ["a", "b", "c"]):
        torch.testing.assert_close(model(x), torch.cat(expected))
    assert groups == [3, 3]


def test_adapters_with_as_many_rows_run_as_one(groups: list[int]) -> None:
    model, injections = adapted(*["ia3"] * 5)
    a, b, c, d, e = (injection.name for injection in injections)
    check_rows(model, injections, [a, b, c, b, d, a, e])
    assert set(groups) == {2, 3}  # a and b have two rows each, c, d and e one


def test_other_methods_sizes_and_settings_run_by_themselves(groups: list[int]) -> None:
    model, injections = adapted("ia3", "pissa", "vera")
    injections.append(peftcore.apply(model, "pissa", name="wide", rank=4))
    injections.append(peftcore.apply(model, "pissa", name="loud", alpha=16.0))
    for seed, injection in enumerate(injections[3:]):
        fill(injection, 7 + seed)
    check_rows(model, injections, [injection.name for injection in injections])
    assert not groups


def test_what_is_written_to_an_operator_between_two_forwards_counts(groups: list[int]) -> None:
    """A number, a mode, a hook and a tensor of another shape: nothing is remembered of how operators looked."""
    model, injections = adapted(*["pissa"] * 3)
    names: list[str | None] = [injection.name for injection in injections]
    check_rows(model, injections, names)
    assert set(groups) == {3}
    groups.clear()
    for operator in injections[1].operators.values():
        operator.scale *= 3.0
    check_rows(model, injections, names)
    assert set(groups) == {2}
    groups.clear()
    seen: list[torch.Size] = []
    for operator in injections[2].operators.values():
        operator.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    check_rows(model, injections, names)
    assert not groups and {shape[0] for shape in seen} == {1, 3}, "hooks see the rows of their own adapter"


def test_two_forwards_at_once_do_not_see_each_others_tensors() -> None:
    """An operator is looked at, and nothing is put into it: a forward inside of another one is right."""
    model, injections = adapted(*["ia3"] * 2)
    names: list[str | None] = [injection.name for injection in injections]
    ids = token_ids(2)
    expected = separately(model, ids, names)
    operator = next(iter(injections[0].operators.values()))
    inner = type(operator).forward
    seen: list[Tensor] = []

    def forward(self: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        if not seen:
            seen.append(x)
            with activate(model, names[1]), torch.no_grad():  # type: ignore[arg-type]
                torch.testing.assert_close(model(ids)["logits"][1], expected[1])
        return inner(self, call, x)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(operator), "forward", forward)
        with route(model, names):
            torch.testing.assert_close(model(ids)["logits"], expected)
    assert seen


def test_dropout_differs_for_each_row() -> None:
    model = host()
    injections = [peftcore.apply(model, "lora", name=name, dropout=0.5, rank=4) for name in "abcd"]
    for injection in injections:
        fill(injection, 0)  # all alike
    ids = token_ids(1).expand(4, -1)
    with route(model, list("abcd")), torch.no_grad():
        logits = model.train()(ids)["logits"]
        assert all(not torch.equal(logits[0], each) for each in logits[1:])
        quiet = model.eval()(ids)["logits"]
        torch.testing.assert_close(quiet, quiet[:1].expand_as(quiet))


@pytest.mark.parametrize(("dropout", "together"), [(0.0, {3}), (0.5, set())])
def test_who_draws_by_a_seed_of_its_own_runs_by_itself(dropout: float, together: set[int], groups: list[int]) -> None:
    model = host()
    for seed, name in enumerate("abc"):
        fill(peftcore.apply(model, "pissa", name=name, dropout=dropout), seed)
    ids = token_ids(3)
    with torch.no_grad(), route(model, list("abc"), seeds=dict.fromkeys("abc", 5)):
        first = model.train()(ids)["logits"]
        assert set(groups) == together
        torch.testing.assert_close(model(ids)["logits"], first)


def llama() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, vocab_size=64, attn_implementation="eager")
    return transformers.LlamaForCausalLM(config)


def cost(model: nn.Module, ids: Tensor, training: bool) -> tuple[int, int]:
    """FLOPs and dispatched operations of a step, by torch's own counters."""

    def step() -> None:
        with torch.set_grad_enabled(training):
            loss = model(ids, labels=ids).loss
        if training:
            loss.backward()

    model.train(training)
    step()  # what is planned once is no part of it
    with Counts() as counted:
        step()
    return counted.flops, counted.operations


def costs(method: str, adapters: int, training: bool) -> tuple[float, float]:
    """FLOPs of a step with so many adapters, in those of so many steps with one row; operations, in those of a step
    with one adapter and as many rows."""
    ids = torch.randint(0, 64, (adapters, 16))
    options = {"add_missing_bias": True} if method == "bitfit" else {}
    model = llama()
    peftcore.apply(model, method, **options)
    (alone, _), (_, one) = cost(model, ids[:1], training), cost(model, ids, training)
    model = llama()
    names = [f"adapter{n}" for n in range(adapters)]
    for name in names:
        peftcore.apply(model, method, name=name, **options)
    with route(model, names):
        flops, operations = cost(model, ids, training)
    return flops / (adapters * alone), operations / one


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["lora", "pissa", "olora", "vera", "lora_xs", "miss", "ia3", "mov", "ln_tuning"])
def test_eight_adapters_take_at_most_half_more_operations_than_one(method: str, training: bool) -> None:
    flops, operations = costs(method, 8, training)
    assert flops <= 1.03 and operations <= 1.5


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [32, 256])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["lora", "vera", "ia3", "dora", "oft", "houlsby_adapter", "bitfit", "prefix_tuning"])
def test_many_adapters_take_the_operations_of_as_many_solo_steps(method: str, training: bool, adapters: int) -> None:
    flops, _ = costs(method, adapters, training)
    assert flops <= 1.03
