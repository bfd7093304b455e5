"""What holds for one forward: routes by rows, context, taps, losses, extra passes, threads."""

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_toys import TapMethod, TaskMethod, TwiceMethod, WholeBatch, fill, gradients, host
from core_toys import token_ids
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import peftcore
from peftcore import activate, call, route
from peftcore.errors import MergeError, MissingContext, RouteError, UnknownInjection
from peftcore.forward.choice import Route
from peftcore.forward.host_state import state_of
from peftcore.forward.routing import OneForward, each_its_own

METHODS = [("lora", {}), ("dora", {}), ("ia3", {}), ("houlsby_adapter", {}), ("bitfit", {}), ("ln_tuning", {})]


def adapted(*methods: str) -> tuple[nn.Module, list[peftcore.Injection]]:
    model = host()
    injections = [peftcore.apply(model, method, name=f"{method}{index}") for index, method in enumerate(methods)]
    for index, injection in enumerate(injections):
        fill(injection, index)
    return model, injections


def separately(model: nn.Module, ids: Tensor, names: list[str | None]) -> Tensor:
    rows = []
    for index, name in enumerate(names):
        with activate(model, *([] if name is None else [name])):
            rows.append(model(ids)["logits"][index])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "methods", [("lora", "lora"), ("dora", "ia3"), ("dora", "oft"), ("houlsby_adapter", "bitfit"), ("ln_tuning",)]
)
def test_routed_rows_equal_separate_passes_with_their_gradients(methods: tuple[str, ...]) -> None:
    model, injections = adapted(*methods)
    names: list[str | None] = [injections[0].name, None, injections[-1].name, injections[0].name]
    ids = token_ids(4)
    direction = torch.randn(4, 5, 11)
    for injection in injections:
        injection.trainable(True)
    expected = separately(model, ids, names)
    (expected * direction).sum().backward()
    wanted = gradients(*injections)
    with route(model, names):
        routed = model(ids)["logits"]
    (routed * direction).sum().backward()
    torch.testing.assert_close(routed, expected, rtol=1e-5, atol=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in wanted)
    for actual, gradient in zip(gradients(*injections), wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5)


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
    with activate(model):
        assert not bare or torch.equal(routed[2], model(ids)["logits"][2])


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
    output = each_its_own(split, torch.arange(5.0).view(5, 1), OneForward(run, nn.Identity()), act)
    assert output.flatten().tolist() == [1, 10, 20, 31, 47]
    assert seen == [[0, 1, 2, 3, 4], [4.5]]


def test_in_evaluation_the_base_runs_once_for_all_who_do_not_change_what_goes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, injections = adapted("dora", "hra", "lora")
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


def test_rows_that_are_repeated_go_where_theirs_go() -> None:
    model, (one, two) = adapted("dora", "oft")
    ids = token_ids(2).repeat_interleave(3, 0)
    with torch.no_grad():
        with route(model, [one.name, two.name], copies=3):
            routed = model(ids)["logits"]
        torch.testing.assert_close(routed, separately(model, ids, 3 * [one.name] + 3 * [two.name]))
        with pytest.raises(RouteError, match="a module got 5 rows"), route(model, [one.name, two.name]):
            model.layers[0](torch.randn(5, 4, 8))


def test_rows_of_the_bare_base_are_the_base_to_the_bit() -> None:
    model, injections = adapted("lora", "dora")
    ids = token_ids(3)
    with activate(model):
        base = model(ids)["logits"]
    with route(model, [None, injections[0].name, None]):
        routed = model(ids)["logits"]
    assert torch.equal(routed[[0, 2]], base[[0, 2]]) and not torch.equal(routed[1], base[1])


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


def test_a_route_is_refused_where_rows_cannot_be_told_apart() -> None:
    model, (lora, _) = adapted("lora", "dora")
    with pytest.raises(UnknownInjection, match="nowhere"):
        route(model, ["nowhere"])
    with pytest.raises(RouteError, match="no rows"):
        route(model, [])
    with pytest.raises(RouteError, match=r"3 rows .* the batch 2"), route(model, [lora.name, None, None]):
        model(token_ids(2))
    lora.merge()
    with pytest.raises(MergeError, match="merged"):
        route(model, [lora.name])
    lora.unmerge()
    whole = peftcore.apply(model, WholeBatch)
    with pytest.raises(RouteError, match="whole batch"):
        route(model, [whole.name])
    assert state_of(model).now().route is None


def test_experts_and_position_tables_are_not_routed() -> None:
    from peftcore.testing.hosts import HOSTS

    for name, target in (("moe", "experts.down"), ("bert", "embed.pos")):
        model, inputs = HOSTS[name].build()
        injection = peftcore.apply(model, "lora", target=target)
        with pytest.raises(RouteError, match="cannot be told apart"):
            route(model, [injection.name] * len(inputs["input_ids"]))


def test_activating_inside_a_route_ends_it_until_the_end_of_the_block() -> None:
    model, (one, two) = adapted("lora", "dora")
    ids = token_ids(2)
    with route(model, [one.name, two.name]):
        routed = model(ids)["logits"]
        with activate(model, one.name):
            assert torch.equal(model(ids)["logits"], separately(model, ids, [one.name] * 2))
        assert torch.equal(model(ids)["logits"], routed)
        two.remove()
        with activate(model, one.name):
            plain = model(ids)["logits"]
        assert torch.equal(model(ids)["logits"], plain)  # a route that lost a name is over


def test_a_route_in_one_thread_is_not_seen_by_another() -> None:
    model, (one, two) = adapted("lora", "dora")
    ids = token_ids(2)
    with torch.no_grad():
        expected = separately(model, ids, [one.name, two.name])
        both = model(ids)["logits"]
    results: dict[str, Tensor] = {}
    inside, done = threading.Event(), threading.Event()

    def routed() -> None:
        with torch.no_grad(), route(model, [one.name, two.name]):
            inside.set()
            done.wait(10)
            results["routed"] = model(ids)["logits"]

    thread = threading.Thread(target=routed)
    thread.start()
    inside.wait(10)
    with torch.no_grad():
        assert torch.equal(model(ids)["logits"], both)
    done.set()
    thread.join()
    torch.testing.assert_close(results["routed"], expected)


def test_a_copy_made_inside_a_route_is_outside_of_it() -> None:
    model, (one, two) = adapted("lora", "dora")
    with route(model, [one.name, two.name]):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        assert torch.equal(twin(token_ids(3))["logits"], model(token_ids(3))["logits"])


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


def test_context_reaches_operators_in_forward_and_generate() -> None:
    from peftcore.testing.hosts import HOSTS

    model, inputs = HOSTS["llama"].build()
    peftcore.apply(model, TaskMethod)
    with pytest.raises(MissingContext, match=r"peftcore\.call\(model, strength="):
        model(**inputs)
    with call(model, strength=0.0):
        plain = model(**inputs).logits
        with call(model, other=1, strength=3.0):
            strong = model(**inputs).logits
            words = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(model(**inputs).logits, plain)
    with activate(model):
        assert torch.equal(model(**inputs).logits, plain)
        assert not torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), words)
    assert not torch.equal(plain, strong)


def test_the_record_names_the_inputs_and_is_gone_afterwards() -> None:
    seen: dict[str, Any] = {}
    model, _ = adapted("lora")
    model.norm.register_forward_hook(lambda *_: seen.update(peftcore.forward_context().inputs))
    ids = token_ids(2)
    model(ids, labels=ids)
    assert seen["ids"] is ids and seen["labels"] is ids
    assert not peftcore.forward_context().inputs


@pytest.mark.parametrize("compiled", [False, True])
def test_taps_and_losses(compiled: bool) -> None:
    """One operator sees what another left; what operators add stands in the output's loss, in training only."""
    torch.compiler.reset()
    model = host()
    injection = peftcore.apply(model, TapMethod)
    fill(injection, 3)
    ids = token_ids(2)
    twin = copy.deepcopy(model)
    inputs: list[Tensor] = []
    for layer in twin.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    twin(ids)
    readers = [injection.operators[f"layers.{index}.mlp.down_proj"] for index in (0, 1)]
    extra = sum((reader.gain * x).square().mean() for reader, x in zip(readers, inputs, strict=True))
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    trained = run(ids, labels=ids)
    model.eval()
    plain = model(ids, labels=ids)
    torch.testing.assert_close(trained["logits"], plain["logits"])
    torch.testing.assert_close(trained["loss"] - plain["loss"], extra)
    assert extra > 1e-3
    assert model(ids).keys() == {"logits"}
    assert not peftcore.forward_context().taps
    torch.compiler.reset()


def test_kept_taps_last_until_backward_is_done() -> None:
    """What one block leaves for another must be there when that one alone runs again; other taps must be gone."""
    model = host()
    kept, passing = peftcore.Tap(kept=True), peftcore.Tap()
    states: list[Any] = []

    def write(module: Any, args: Any, output: Tensor) -> None:
        for tap in (kept, passing):
            tap.put(output.detach())
        states.append(weakref.ref(kept.get()))

    def read(gradient: Tensor) -> None:
        assert kept.get() is states[0]()
        assert passing.get() is None

    peftcore.apply(model, "lora")
    model.layers[0].register_forward_hook(write)
    model.layers[1].register_forward_hook(lambda module, args, output: output.register_hook(read) and None)
    logits = model(token_ids(2))["logits"]
    logits.sum().backward()
    del logits
    assert states[0]() is None


def test_an_extra_pass_leaves_out_the_injection_and_nothing_else() -> None:
    model = host().eval()
    lora = peftcore.apply(model, "lora", target="self_attn.q_proj")
    fill(lora, 1)
    x = torch.randn(2, 5, 8)
    plain = model.layers[0](x)
    peftcore.apply(model, TwiceMethod)
    with call(model, strength=1.0):
        twice = model.layers[0](x)
        with peftcore.injections(model)["toy_twice"].disabled():
            assert torch.equal(model.layers[0](x), plain)
    full = twice - plain  # gain is one
    with call(model, strength=0.0):
        torch.testing.assert_close(model.layers[0](x), 2 * plain)
    assert not torch.allclose(full, plain, atol=1e-3)
    assert state_of(model).threads == {}


def test_an_extra_pass_leaves_the_cache_alone() -> None:
    from peftcore.testing.hosts import HOSTS

    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model, TwiceMethod)
    with torch.no_grad():
        for operator in injection.operators.values():
            operator.gain.mul_(0.02)
    with call(model, strength=1.0), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        cached = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        uncached = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


def test_nothing_of_the_record_stays_when_forward_raises_or_the_injection_goes() -> None:
    model = host()
    hooks = dict(model._forward_hooks), dict(model._forward_pre_hooks)
    injection = peftcore.apply(model, TaskMethod)
    with pytest.raises(MissingContext):
        model(token_ids(2))
    assert not peftcore.forward_context().inputs
    injection.remove()
    notes = (model._forward_hooks_with_kwargs, model._forward_hooks_always_called, model._forward_pre_hooks_with_kwargs)
    assert (dict(model._forward_hooks), dict(model._forward_pre_hooks)) == hooks and not any(notes)


def in_the_middle(model: nn.Module, run: Callable[[], None]) -> Any:
    """Let something happen once, when the host's first layer has run."""

    def once(*_: Any) -> None:
        handle.remove()
        run()

    handle = model.layers[0].register_forward_hook(once)
    return handle


def in_a_thread(run: Callable[[], None]) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_a_choice_in_the_middle_of_a_forward_holds_from_there() -> None:
    model, (_, two) = adapted("lora", "dora")
    ids = token_ids(2)
    with torch.no_grad():
        first = model.layers[0](model.embed_tokens(ids))
        with activate(model, two.name):
            expected = model.lm_head(model.norm(model.layers[1](first)))
        assert not torch.equal(model(ids)["logits"], expected)
        in_the_middle(model, lambda: activate(model, two.name))
        assert torch.equal(model(ids)["logits"], expected)


def test_another_threads_choice_in_the_middle_of_a_forward() -> None:
    model, (_, two) = adapted("lora", "dora")
    ids, found = token_ids(2), []

    def alone() -> None:
        with torch.no_grad(), activate(model, two.name):
            found.append(model(ids)["logits"])

    with torch.no_grad():
        both, (wanted, *_) = model(ids)["logits"], separately(model, ids, [two.name] * 2)
        in_the_middle(model, lambda: in_a_thread(alone))
        assert torch.equal(model(ids)["logits"], both)
    torch.testing.assert_close(found[0][0], wanted)


def test_a_part_that_another_thread_runs_in_the_middle_of_a_forward_has_a_record_of_its_own() -> None:
    model = host().eval()
    peftcore.apply(model, TaskMethod)
    x, found = torch.randn(2, 5, 8), []

    def part() -> None:
        found.append(model.layers[1](x))

    with torch.no_grad(), call(model, strength=0.5):
        wanted = model.layers[1](x)
        in_the_middle(model, lambda: in_a_thread(part))
        model(token_ids(2))
    assert torch.equal(found[0], wanted)


def test_backward_in_the_middle_of_another_forward_repeats_what_its_own_did() -> None:
    model = host(reentrant=False)
    one, two = (peftcore.apply(model, method, name=method) for method in ("lora", "dora"))
    ids, direction = token_ids(2), torch.randn(2, 5, 11)
    for seed, injection in enumerate((one, two)):
        fill(injection, seed)
        injection.trainable(True)

    def loss() -> Tensor:
        with activate(model, one.name):
            return (model(ids)["logits"] * direction).sum()

    loss().backward()
    wanted = gradients(one)
    with activate(model, two.name), torch.no_grad():
        other = model(ids)["logits"]
    late = loss()
    with activate(model, two.name):
        handle = model.embed_tokens.register_forward_hook(lambda *_: late.backward())
        torch.testing.assert_close(model(ids)["logits"], other)
        handle.remove()
    for actual, gradient in zip(gradients(one), wanted, strict=True):
        torch.testing.assert_close(actual, gradient)


def test_an_extra_pass_in_a_forward_of_the_host() -> None:
    """It leaves the injection out though its modules run by the owner's choice otherwise."""
    model = host().eval()
    ids = token_ids(2)
    bare = model.layers[0](model.embed_tokens(ids))
    peftcore.apply(model, TwiceMethod)
    seen: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad(), call(model, strength=1.0):
        model(ids)
        operator = peftcore.injections(model)["toy_twice"].operators["layers.0"]
        operator.gain.zero_()
        model(ids)
    torch.testing.assert_close(seen[0] - seen[1], bare)


def test_a_forward_that_is_over_leaves_nothing_to_go_by() -> None:
    model, _ = adapted("lora")
    state = state_of(model)
    during: list[int | None] = []
    in_the_middle(model, lambda: during.append(state.calm))
    model(token_ids(2))
    assert during == [threading.get_ident()] and state.calm is None
    in_the_middle(model, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(token_ids(2))
    assert state.calm is None
