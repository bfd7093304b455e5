"""Rows of a batch that go to different injections: equal to separate passes, and one base forward for all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from call_toys import TaskMethod, adapted, check_rows, fill, gradients, host, separately
from core_toys import token_ids
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import peftcore
from peftcore import activate, call, route
from peftcore.errors import RouteError
from peftcore.forward.choice.active_adapters import Route
from peftcore.forward.rows.routing import OfSomeRows, OneForward, OwnRows, of_tensors, put_together, select_rows
from peftcore.testing.tools import Counts


@pytest.mark.parametrize(
    "methods", [("lora", "lora"), ("dora", "ia3"), ("dora", "oft"), ("houlsby_adapter", "bitfit"), ("ln_tuning",)]
)
def test_routed_rows_equal_separate_passes_with_their_gradients(methods: tuple[str, ...]) -> None:
    model, injections = adapted(*methods)
    check_rows(model, injections, [injections[0].name, None, injections[-1].name, injections[0].name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_of_what_acts_on_weights_each_has_its_own_rows_alone(
    training: bool, bare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So neither are effective weights made, which could be kept for one of them, nor rows computed for nothing."""
    model, injections = adapted("oft", "dora", "lora", "hra")
    model.train(training)
    oft, dora, lora, hra = (injection.name for injection in injections)
    names = [hra, oft, None if bare else dora, lora, dora, oft]
    ids = token_ids(6)
    with torch.set_grad_enabled(training):
        expected = separately(model, ids, names)
        seen = {injection.name: rows_seen(injection, monkeypatch) for injection in injections if injection.name != lora}
        with route(model, names):
            routed = model(ids)["logits"]
    torch.testing.assert_close(routed, expected, rtol=1e-5, atol=1e-6)
    assert {name: set(rows) for name, rows in seen.items()} == {oft: {2}, dora: {1 if bare else 2}, hra: {1}}
    if bare:
        with activate(model):
            torch.testing.assert_close(routed[2], model(ids)["logits"][2])


def rows_seen(injection: peftcore.Injection, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows an injection's operators act on, call by call."""
    seen: list[int] = []
    for operator in injection.operators.values():

        def noting(call: Any, x: Tensor, prepared: Any, inner: Any = operator.activation_form) -> Any:
            seen.append(len(x))
            return inner(call, x, prepared)

        monkeypatch.setitem(vars(operator), "activation_form", noting)
    return seen


def test_who_asks_what_each_row_of_the_batch_was_told_is_given_all_rows() -> None:
    model = host()
    named = {"one": "dora", "two": "oft", "told": TaskMethod}
    for number, (name, method) in enumerate(named.items()):
        fill(peftcore.apply(model, method, name=name, target="mlp.down"), number)
    names: list[str | None] = ["two", "told", "one", "told"]
    ids = token_ids(4)
    with torch.no_grad(), call(model, strength=torch.arange(4.0).view(4, 1, 1)):
        expected = separately(model, ids, names)
        with route(model, names):
            torch.testing.assert_close(model(ids)["logits"], expected)


@pytest.mark.parametrize("told", [["a", "b", "a", "b"], torch.tensor([0, 1, 0, 1]), "b"])
def test_what_a_call_told_each_row_goes_with_the_rows(told: Any) -> None:
    """A list, a tensor, or one value for all."""
    model = host().eval()
    for number, name in enumerate(("one", "two")):
        fill(peftcore.apply(model, "polytropon", name=name, target="mlp.down", tasks=["a", "b"], rank=2), number)
    names: list[str | None] = ["two", "one", None, "two"]
    ids = token_ids(4)
    with torch.no_grad(), call(model, task=told):
        expected = separately(model, ids, names)
        with route(model, names):
            torch.testing.assert_close(model(ids)["logits"], expected)


def test_rows_are_cut_out_of_containers_and_nothing_else() -> None:
    rows = OwnRows(Route(("a", "b"), torch.tensor([0, 1, 0]), positions=(0, 1, 0)), (0,), 6)
    batch, flat, other = torch.arange(3), torch.arange(6), torch.arange(5)
    found = rows.of({0: batch, "x": [flat, (other, None)], "y": "abc"})
    assert found[0].tolist() == [0, 2] and found["x"][0].tolist() == [0, 1, 4, 5]
    assert found["x"][1] == (other, None) and found["y"] == "abc"
    assert rows.told(["p", "q", "r"]) == ["p", "r"] and rows.told("pqr") == "pqr"
    assert rows.spread(torch.tensor([7, 8])).tolist() == [7, 0, 8]


class Pair(NamedTuple):
    first: Tensor
    second: Any


def test_containers_of_all_kinds_are_cut_and_joined_alike() -> None:
    places, x = (1, 0, 1), torch.arange(3.0)
    split = Route(("a", "b"), torch.tensor(places), positions=places)
    whole = {0: Pair(x, [x + 10, None]), "x": (x + 20, {"y": x + 30}), "z": "abc"}
    parts = {(n,): OwnRows(split, (n,), 3).of(whole) for n in (0, 1)}
    assert parts[1,][0] == Pair(parts[1,][0].first, parts[1,][0].second) and parts[1,][0].second[0].tolist() == [10, 12]
    joined, other = put_together(parts, split), of_tensors(lambda each: each + 100, whole)
    mixed = select_rows(whole, other, split, 1)
    for name, made, expected in (("joined", joined, x), ("selected", mixed, x + torch.tensor([100, 0, 100]))):
        assert type(made[0]) is Pair and made[0].second[1] is None and made["z"] == "abc", name
        tensors = made[0].first, made[0].second[0] - 10, made["x"][0] - 20, made["x"][1]["y"] - 30
        assert all(torch.equal(each, expected) for each in tensors), name
    spread = OwnRows(split, (0,), 3).spread(parts[0,])
    assert spread["x"][1]["y"].tolist() == [0, 31, 0] and spread[0].first.tolist() == [0, 1, 0]


def test_tokens_of_their_own_have_the_entries_of_their_rows() -> None:
    split = Route(("a",), torch.tensor([0, 0]), positions=(0, 0), since=(1, 0)).by_tokens(0, 2, 2)
    assert split.tokens == 2 and split.positions == (-1, 0, 0, 0)
    rows = OwnRows(split, (0,), 4)
    assert rows.of(torch.tensor([5, 6])).tolist() == [5, 6, 6] and rows.told(["p", "q"]) == ["p", "q", "q"]


def test_a_route_that_was_tried_in_inference_mode_trains() -> None:
    model, (one, two) = adapted("dora", "oft")
    with route(model, [one.name, two.name]):
        with torch.inference_mode():
            model(token_ids(2))
        model(token_ids(2))["logits"].sum().backward()
    assert all(gradient.any() for gradient in gradients(one, two))


def test_one_forward_of_all_rows_does_for_all_who_do_not_change_what_goes_in() -> None:
    """And for the bare base: a product of fewer rows may round otherwise."""
    seen: list[list[float]] = []

    def run(x: Tensor) -> Tensor:
        seen.append(x[:, 0].tolist())
        return 10 * x

    def act(position: int, bare: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: bare(x + 0.5 if position == 2 else x) + position

    places = (1, -1, 0, 1, 2)
    split = Route(("a", "b", "c"), torch.tensor(places), positions=places)
    x, whole, parts = torch.arange(5.0).view(5, 1), OneForward(run, nn.Identity()), {}
    for position in split.present:
        bare = OfSomeRows(whole, ((x,), {}), OwnRows(split, (position,), 5))
        parts[position,] = (bare if position < 0 else act(position, bare))(*bare.given[0])
    output = put_together(parts, split)
    assert output.flatten().tolist() == [1, 10, 20, 31, 47]
    assert seen == [[0, 1, 2, 3, 4], [4.5]]


def test_in_evaluation_the_base_runs_once_for_all_who_do_not_change_what_goes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, injections = adapted("dora", "houlsby_adapter", "lora")
    model.eval()
    names = [injections[0].name, injections[1].name, None, injections[2].name]
    ids = token_ids(4)
    with torch.no_grad():
        expected = separately(model, ids, names)
        with route(model, names):
            model(ids)
            calls: list[int] = []
            linear = nn.functional.linear
            base = {id(each.weight) for each in model.modules() if isinstance(each, nn.Linear)}

            def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                calls.extend([id(weight)] * (id(weight) in base))
                return linear(x, weight, bias)

            monkeypatch.setattr(nn.functional, "linear", counted)
            routed = model(ids)["logits"]
    torch.testing.assert_close(routed, expected, rtol=1e-5, atol=1e-6)
    assert calls and len(calls) == len(set(calls))


def test_who_changes_what_goes_in_leaves_the_others_one_forward_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model, injections = adapted("oft", "dora", "lora", "hra")
    model.eval()
    oft, dora, lora, hra = (injection.name for injection in injections)
    names = [dora, oft, None, lora, hra, dora]
    ids = token_ids(6)
    with torch.no_grad():
        expected = separately(model, ids, names)
        base = {id(each.weight) for each in model.modules() if isinstance(each, nn.Linear)}
        calls: list[tuple[int, int]] = []
        linear = nn.functional.linear

        def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            calls.extend([(id(weight), len(x))] * (id(weight) in base))
            return linear(x, weight, bias)

        monkeypatch.setattr(nn.functional, "linear", counted)
        with route(model, names):
            routed = model(ids)["logits"]
    torch.testing.assert_close(routed, expected, rtol=1e-5, atol=1e-6)
    rows = {each: sorted(count for weight, count in calls if weight == each) for each in base}
    assert [1, 1, 4] in rows.values() and all(found in ([1, 1, 4], [6], []) for found in rows.values()), rows


def test_in_a_module_where_nothing_of_theirs_acts_rows_are_the_base_s() -> None:
    model = host().eval()
    for number, (name, target) in enumerate((("one", "mlp.up"), ("two", "mlp.down"))):
        fill(peftcore.apply(model, "dora", name=name, target=target), number)
    ids = token_ids(3)

    def operations(*names: str | None) -> int:
        with torch.no_grad(), route(model, names):
            model(ids)  # which rows are whose is written down once
            with Counts() as counted:
                model(ids)
        return counted.operations

    none, one, two = operations(None, None, None), operations("one", None, None), operations("two", None, None)
    assert none < min(one, two) and operations("one", "two", None) == one + two - none


def test_rows_that_are_repeated_go_where_theirs_go() -> None:
    model, (one, two) = adapted("dora", "oft")
    ids = token_ids(2).repeat_interleave(3, 0)
    with torch.no_grad():
        with route(model, [one.name, two.name], copies=3):
            routed = model(ids)["logits"]
        torch.testing.assert_close(routed, separately(model, ids, 3 * [one.name] + 3 * [two.name]))
        with pytest.raises(RouteError, match="a module received 5 rows"), route(model, [one.name, two.name]):
            model.layers[0](torch.randn(5, 4, 8))


def test_rows_of_the_bare_base_are_the_base_to_the_bit() -> None:
    model, injections = adapted("lora", "dora")
    ids = token_ids(3)
    with activate(model):
        base = model(ids)["logits"]
    with route(model, [None, injections[0].name, None]):
        routed = model(ids)["logits"]
    assert torch.equal(routed[[0, 2]], base[[0, 2]]) and not torch.equal(routed[1], base[1])


@pytest.mark.slow
def test_any_assignment_of_rows_is_one_compiled_graph() -> None:
    torch.compiler.reset()
    model, injections = adapted("lora", "dora", "ia3")
    model(token_ids(4))
    one, two, three = (injection.name for injection in injections)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names in ([one, two, three, None], [None, three, one, two], [three, two, one, one]):
        with torch.no_grad(), route(model, names):
            torch.testing.assert_close(compiled(token_ids(4))["logits"], separately(model, token_ids(4), names))
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_generation_with_beams_repeats_the_rows_of_a_route() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    one, two = (peftcore.apply(model, "lora", name=name, target="all-linear") for name in ("one", "two"))
    fill(one, 1), fill(two, 2)
    ids = torch.randint(2, 32, (3, 5))
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    names = ["two", None, "one"]
    with route(model, names, copies=3):
        routed = model.generate(ids, **options)
    expected = []
    for index, name in enumerate(names):
        with activate(model, *([] if name is None else [name])):
            expected.append(model.generate(ids[index : index + 1], **options)[0])
    assert torch.equal(routed, torch.stack(expected))
    with activate(model):
        assert not torch.equal(routed, model.generate(ids, **options))
    with pytest.raises(RouteError, match="num_beams"), route(model, names):
        model.generate(ids, **options)


def test_a_bias_of_all_windows_is_refused_and_without_it_each_row_is_as_alone() -> None:
    """The module that makes it is given nothing, so it makes one for all rows, of which there are more within."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}
    model = transformers.SwinModel(transformers.SwinConfig(**sizes)).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    injection = peftcore.apply(model, "svdiff", name="a", dtype="float64")
    with pytest.raises(RouteError, match=r"relative_position_bias_table, where rows .* exclude it"):
        route(model, ["a", None])
    injection.remove()
    fill(peftcore.apply(model, "svdiff", name="a", dtype="float64", exclude="*relative_position_bias"), 1)
    with torch.no_grad():
        with route(model, ["a", None]):
            found = model(x).last_hidden_state
        with activate(model, "a"):
            torch.testing.assert_close(found[:1], model(x[:1]).last_hidden_state)
        with activate(model):
            torch.testing.assert_close(found[1:], model(x[1:]).last_hidden_state)
