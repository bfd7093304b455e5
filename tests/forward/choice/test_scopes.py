"""Choices of blocks, threads and tasks: each has its own, in order, and they are gone with it."""

import asyncio
import contextlib
import copy
import gc
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from core_toys import Doubling, Shift, perceptron
from torch import Tensor, nn

import peftcore
from peftcore import activate, route, using
from peftcore.errors import AmbiguousChoice, BlockOrderError, RouteError, UnknownInjection
from peftcore.forward.state.host_state import state_of

X = torch.ones(2, 4)


def served() -> tuple[nn.Module, dict[str | None, Tensor]]:
    """A model with adapters a, b and c, of which a is active, and the output under each, and of the bare model."""
    model = perceptron()
    for name, method, target in (("a", Shift, "first"), ("b", Doubling, "second"), ("c", Shift, "second")):
        peftcore.apply(model, method, name=name, target=target)
    expected: dict[str | None, Tensor] = {}
    for each in ("a", "b", "c", None):
        activate(model, *filter(None, [each]))
        expected[each] = model(X)
    assert all(not torch.equal(expected["a"], each) for name, each in expected.items() if name != "a")
    activate(model, "a")
    return model, expected


def in_a_thread(run: Callable[[], Any]) -> Any:
    """The result of a function in a new thread, or its error."""
    found: list[Any] = []

    def caught() -> None:
        try:
            found.append(run())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join(30)
    return found[0]


# ------------------------------------------------------------------------------------------------------------ threads


def test_a_thread_that_ended_leaves_its_choice_to_nobody() -> None:
    model, expected = served()
    for _ in range(50):  # the system gives numbers of threads again
        in_a_thread(lambda: activate(model, "b"))
        assert torch.equal(in_a_thread(lambda: model(X)), expected["a"])
    assert not state_of(model).choices.own


def test_the_number_of_the_owner_is_not_the_owner() -> None:
    models: list[nn.Module] = []
    in_a_thread(lambda: models.append(served()[0]))
    (model,) = models
    expected = model(X)
    for _ in range(20):
        in_a_thread(lambda: activate(model, "b"))
        assert torch.equal(model(X), expected)


def test_threads_of_a_pool_do_not_inherit_what_a_block_chose() -> None:
    model, expected = served()

    def block(name: str) -> Tensor:
        with activate(model, name):
            return model(X)

    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(block, "b").result(), expected["b"])
        assert torch.equal(pool.submit(model, X).result(), expected["a"])
        pool.submit(activate, model, "c").result()  # a statement holds in that thread
        assert torch.equal(pool.submit(model, X).result(), expected["c"])
        assert torch.equal(pool.submit(block, "b").result(), expected["b"])
        assert torch.equal(pool.submit(model, X).result(), expected["c"])
    assert torch.equal(model(X), expected["a"])


def test_threads_that_start_in_a_block_of_the_owner_follow_it() -> None:
    model, expected = served()
    with activate(model, "b"):
        assert torch.equal(in_a_thread(lambda: model(X)), expected["b"])
    assert torch.equal(in_a_thread(lambda: model(X)), expected["a"])


@pytest.mark.parametrize("form", ["block", "call"])
def test_a_thread_that_starts_in_another_threads_choice_has_to_say_what_it_wants(form: str) -> None:
    model, expected = served()

    def work() -> list[Any]:
        return [in_a_thread(lambda: model(X)), in_a_thread(lambda: using(model, "c")(model, X))]

    def block() -> list[Any]:
        with activate(model, "b"):
            return work()

    refused, chosen = in_a_thread(block) if form == "block" else using(model, "b")(work)
    assert isinstance(refused, AmbiguousChoice) and "using(model, name)" in str(refused)
    assert torch.equal(chosen, expected["c"])
    assert torch.equal(in_a_thread(lambda: model(X)), expected["a"])


# -------------------------------------------------------------------------------------------------------------- tasks


def test_tasks_that_take_turns_have_each_its_own_block() -> None:
    model, expected = served()

    async def request(name: str) -> list[bool]:
        right = []
        with activate(model, name):
            for _ in range(5):
                await asyncio.sleep(0)
                right.append(torch.equal(model(X), expected[name]))
        await asyncio.sleep(0)
        return [*right, torch.equal(model(X), expected["a"])]

    async def serve() -> list[list[bool]]:
        return await asyncio.gather(*(request(name) for name in "bcbacb"))

    assert all(map(all, asyncio.run(serve())))
    assert torch.equal(model(X), expected["a"]) and not state_of(model).choices.own


def test_a_task_hands_its_block_to_what_it_starts() -> None:
    model, expected = served()

    async def serve() -> list[Any]:
        with activate(model, "b"):
            child = asyncio.create_task(asyncio.sleep(0, model))
            threaded = await asyncio.to_thread(model, X)

            async def nested() -> list[Tensor]:
                before = model(X)
                with activate(model, "c"):
                    await asyncio.sleep(0)
                    return [before, model(X)]

            await child
            return [threaded, *await asyncio.create_task(nested()), model(X)]

    for found, name in zip(asyncio.run(serve()), "bbcb", strict=True):
        assert torch.equal(found, expected[name])


def test_a_statement_in_a_task_holds_for_everybody_as_in_a_notebook() -> None:
    model, expected = served()

    async def cell(run: Callable[[], Any]) -> Any:
        return run()

    async def notebook() -> None:
        await asyncio.create_task(cell(lambda: activate(model, "b")))
        assert torch.equal(await asyncio.create_task(cell(lambda: model(X))), expected["b"])
        assert torch.equal(in_a_thread(lambda: model(X)), expected["b"])

    asyncio.run(notebook())
    assert torch.equal(model(X), expected["b"])


def test_a_thread_that_starts_in_the_only_block_of_a_task_follows_it_as_a_streamer_in_a_notebook_does() -> None:
    model, expected = served()

    async def cell() -> list[Tensor]:
        with activate(model, "b"), activate(model, "c"):
            return [model(X), in_a_thread(lambda: model(X))]

    for found in asyncio.run(cell()):
        assert torch.equal(found, expected["c"])


def test_a_thread_without_a_choice_is_refused_where_blocks_of_several_tasks_are_open() -> None:
    model, expected = served()
    open_now, close = asyncio.Event(), asyncio.Event()

    async def holds() -> None:
        with activate(model, "c"):
            open_now.set()
            await close.wait()

    async def serve() -> None:
        other = asyncio.create_task(holds())
        await open_now.wait()
        assert torch.equal(await asyncio.to_thread(model, X), expected["a"])  # of this task, which has no block
        with activate(model, "b"):
            refused = in_a_thread(lambda: model(X))
            assert isinstance(refused, AmbiguousChoice) and "using" in str(refused)
            assert torch.equal(await asyncio.to_thread(model, X), expected["b"])
            assert torch.equal(in_a_thread(lambda: using(model, None)(model, X)), expected[None])
        close.set()
        await other
        assert torch.equal(in_a_thread(lambda: model(X)), expected["a"])

    asyncio.run(serve())


def test_a_thread_that_ran_before_a_tasks_block_is_not_guessed_to_be_its() -> None:
    model, expected = served()

    async def serve(pool: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        assert torch.equal(await loop.run_in_executor(pool, model, X), expected["a"])
        with activate(model, "b"):
            with pytest.raises(AmbiguousChoice):
                await loop.run_in_executor(pool, model, X)
            assert torch.equal(await loop.run_in_executor(pool, using(model, "b"), model, X), expected["b"])
        assert torch.equal(await loop.run_in_executor(pool, model, X), expected["a"])

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(serve(pool))


def test_a_cancelled_task_leaves_nothing_behind() -> None:
    model, expected = served()

    async def request() -> None:
        with activate(model, "b"):
            await asyncio.sleep(30)

    async def serve() -> None:
        task = asyncio.create_task(request())
        await asyncio.sleep(0)
        with activate(model, "c"):
            task.cancel()
            await asyncio.sleep(0)
            assert torch.equal(model(X), expected["c"])
        assert task.cancelled() and torch.equal(model(X), expected["a"])

    asyncio.run(serve())
    assert torch.equal(model(X), expected["a"]) and not state_of(model).choices.own


def test_what_outlives_the_block_in_which_it_was_started_is_refused() -> None:
    model, expected = served()

    async def late() -> list[Any]:
        await asyncio.sleep(0.01)
        with pytest.raises(BlockOrderError, match="that has ended"):
            model(X)
        with activate(model, "c"):
            found = [model(X)]
        with pytest.raises(BlockOrderError, match="that has ended"):
            model(X)
        found.append(using(model, "b")(model, X))
        activate(model, "a")  # a statement says it for everybody, this task too
        return [*found, model(X)]

    async def serve() -> list[Any]:
        with activate(model, "b"):
            task = asyncio.create_task(late())
        assert torch.equal(model(X), expected["a"])
        return await task

    for found, name in zip(asyncio.run(serve()), "cba", strict=True):
        assert torch.equal(found, expected[name])


def test_an_async_generator_that_is_closed_elsewhere_leaves_nothing_behind() -> None:
    model, expected = served()

    async def stream() -> AsyncIterator[Tensor]:
        with activate(model, "b"):
            while True:
                yield model(X)
                await asyncio.sleep(0)

    async def close(steps: Any) -> None:
        await steps.aclose()

    async def serve() -> None:
        steps = stream()
        assert torch.equal(await anext(steps), expected["b"])
        with contextlib.suppress(BlockOrderError):
            await asyncio.create_task(close(steps))
        assert torch.equal(model(X), expected["a"])

    asyncio.run(serve())
    assert torch.equal(model(X), expected["a"])


# -------------------------------------------------------------------------------------------------------------- order


def streams(model: nn.Module, *names: str) -> list[Iterator[Tensor]]:
    def stream(name: str) -> Iterator[Tensor]:
        with activate(model, name):
            while True:
                yield model(X)

    found = [stream(name) for name in names]
    for each in found:
        next(each)
    return found


@pytest.mark.parametrize("elsewhere", [False, True])
def test_blocks_that_are_left_out_of_order_say_so_and_nothing_stays_in_force(elsewhere: bool) -> None:
    model, expected = served()

    def work() -> None:
        first, second, third = streams(model, "b", "c", "a")
        for each in (first, second):
            with pytest.raises(BlockOrderError, match=r"using\(model, name\)"):
                each.close()
        third.close()
        assert torch.equal(model(X), expected["a"])

    if elsewhere:
        assert in_a_thread(work) is None
    else:
        work()
    assert torch.equal(model(X), expected["a"]) and not state_of(model).choices.own


def test_a_choice_that_was_left_early_does_not_come_back() -> None:
    model, expected = served()
    first, second = streams(model, "b", "c")
    with pytest.raises(BlockOrderError):
        first.close()
    assert torch.equal(model(X), expected["c"])
    second.close()
    assert torch.equal(model(X), expected["a"])


def test_a_block_that_is_collected_as_garbage_is_left() -> None:
    model, expected = served()
    steps = streams(model, "b")
    steps.append(steps)  # type: ignore[arg-type]  # a circle
    del steps
    gc.collect()
    assert torch.equal(model(X), expected["a"])


def test_a_block_that_another_task_leaves_is_over_and_says_so() -> None:
    model, expected = served()

    async def serve() -> None:
        block = activate(model, "b")

        async def enter() -> None:
            block.__enter__()

        await asyncio.create_task(enter())
        with pytest.raises(BlockOrderError, match="another task or thread"):
            block.__exit__(None, None, None)

    asyncio.run(serve())
    assert torch.equal(model(X), expected["a"])


def test_a_statement_in_a_block_ends_with_it() -> None:
    model, expected = served()
    with activate(model, "b"):
        activate(model, "c")
        assert torch.equal(model(X), expected["c"])
        with activate(model):
            activate(model, "b")
            assert torch.equal(model(X), expected["b"])
        assert torch.equal(model(X), expected["c"])
    assert torch.equal(model(X), expected["a"])


def test_a_choice_may_be_entered_later_and_more_than_once() -> None:
    model, expected = served()
    block = activate(model, "b")
    activate(model, "c")
    for _ in range(2):
        with block, block:
            assert torch.equal(model(X), expected["b"])
        assert torch.equal(model(X), expected["c"])
    peftcore.injections(model)["b"].remove()
    with pytest.raises(UnknownInjection), block:
        pass
    assert torch.equal(model(X), expected["c"])


def test_a_block_inside_of_a_call_is_the_calls() -> None:
    model, expected = served()

    def work() -> None:
        with activate(model, "b"):
            assert torch.equal(model(X), expected["b"])
        assert torch.equal(model(X), expected["c"])
        activate(model, "b")
        assert torch.equal(model(X), expected["b"])

    using(model, "c")(work)
    assert torch.equal(model(X), expected["a"])


# -------------------------------------------------------------------------------------- injections that come and go


@pytest.mark.parametrize("routed", [True, False])
def test_the_next_forward_of_who_chose_a_removed_injection_says_that_it_is_gone(routed: bool) -> None:
    model, expected = served()
    rows = torch.stack([expected["b"][0], expected[None][1]])
    waits, removed = threading.Event(), threading.Event()

    def keeps() -> None:
        with route(model, ["b", None]) if routed else activate(model, "b"):
            assert torch.equal(model(X), rows if routed else expected["b"])
            waits.set()
            removed.wait(30)
            with pytest.raises(UnknownInjection, match="'b'"):
                model(X)
        assert torch.equal(model(X), expected["a"])

    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(keeps)
        assert waits.wait(30)
        peftcore.injections(model)["b"].remove()
        assert torch.equal(model(X), expected["a"])
        removed.set()
        kept.result()


def test_who_chose_the_last_injection_is_told_too_and_then_nothing_is_left_on_the_model() -> None:
    model = perceptron()
    hooks = dict(model._forward_hooks), dict(model._forward_pre_hooks)
    base = model(X)
    only = peftcore.apply(model, Shift, target="first")

    async def serve() -> None:
        with activate(model, only.name):

            async def remove() -> None:
                only.remove()

            await asyncio.get_running_loop().run_in_executor(None, only.remove)
            with pytest.raises(UnknownInjection):
                model(X)

    asyncio.run(serve())
    assert torch.equal(model(X), base)
    assert (dict(model._forward_hooks), dict(model._forward_pre_hooks)) == hooks and state_of(model) is None


def test_an_injection_that_a_route_of_everybody_names_is_removed_by_nobody() -> None:
    model, expected = served()
    with route(model, ["b", "a"]):
        for remove in (peftcore.injections(model)["b"].remove, peftcore.injections(model)["b"].bake):
            assert isinstance(in_a_thread(remove), RouteError)
        torch.testing.assert_close(model(X), torch.stack([expected["b"][0], expected["a"][1]]))


def active(model: nn.Module) -> str:
    return " ".join(name for name, each in peftcore.injections(model).items() if each.active)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_comes_and_goes_in_nested_blocks(elsewhere: bool) -> None:
    model, _ = served()

    def work() -> None:
        with activate(model, "b", "c"):
            with activate(model, "a", "c"):
                peftcore.apply(model, Shift, name="new", target="first")
                assert active(model) == "a c new"
                peftcore.injections(model)["c"].remove()
                assert active(model) == "a new"
            assert active(model) == "b"
            peftcore.injections(model)["b"].remove()
            assert active(model) == ""
        assert active(model) == "a"
        peftcore.injections(model)["new"].remove()

    assert in_a_thread(work) is None if elsewhere else work() is None
    assert active(model) == "a" and len(peftcore.injections(model)) == 1


def test_routes_values_and_stacks_nest() -> None:
    model, expected = served()
    rows = torch.stack([expected["b"][0], expected[None][1]])
    with route(model, ["b", None]):
        assert torch.equal(model(X), rows)
        with peftcore.call(model, task="rte"):
            assert torch.equal(model(X), rows) and state_of(model).now().context == {"task": "rte"}
            with activate(model, "c"):
                assert torch.equal(model(X), expected["c"]) and state_of(model).now().context == {"task": "rte"}
                with peftcore.injections(model)["c"].disabled():
                    assert torch.equal(model(X), expected[None])
                assert torch.equal(model(X), expected["c"])
            assert torch.equal(model(X), rows)
        assert torch.equal(model(X), rows) and not state_of(model).now().context
    assert torch.equal(model(X), expected["a"])


def test_a_failed_apply_leaves_the_choice_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = served()

    def trainable(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(peftcore.Injection, "trainable", trainable)

    def fails() -> bool:
        with pytest.raises(ZeroDivisionError):
            peftcore.apply(model, Shift, name="late", target="first")
        return not state_of(model).choices.own_scopes()

    assert fails() and in_a_thread(fails) is True  # a thread without a choice has none after it
    assert active(model) == "a" and torch.equal(model(X), expected["a"])
    for run in (lambda: fails(), lambda: in_a_thread(lambda: using(model, "b")(fails))):
        with activate(model, "c"):
            run()
            assert active(model) == "c" and torch.equal(model(X), expected["c"])


# ------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("where", ["block", "task", "call", "thread"])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_acts_as_the_model_did_where_it_was_made(where: str, twin: Callable[[Any], nn.Module]) -> None:
    model, expected = served()

    def in_a_block() -> nn.Module:
        with activate(model, "b"):
            return twin(model)

    async def in_a_task() -> nn.Module:
        return in_a_block()

    made: nn.Module = {
        "block": in_a_block,
        "task": lambda: asyncio.run(in_a_task()),
        "call": lambda: using(model, "b")(twin, model),
        "thread": lambda: in_a_thread(in_a_block),
    }[where]()
    assert torch.equal(made(X), expected["b"]) and torch.equal(model(X), expected["a"])
    if where != "thread":
        activate(made, "c")
        assert torch.equal(made(X), expected["c"]) and torch.equal(in_a_thread(lambda: made(X)), expected["c"])
