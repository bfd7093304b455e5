"""A choice for one call: it holds for what the call runs, in every thread, task and generator, and for nothing else."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from call_toys import TaskMethod, adapted, host, separately
from core_toys import token_ids
from torch import Tensor, nn

import peftcore
from peftcore import Average, Injection, activate, call, using
from peftcore.errors import BlockOrderError, ConfigError, MergeError, MissingContext, RouteError, UnknownInjection

IDS = token_ids(3)


@pytest.fixture
def served() -> Iterator[tuple[nn.Module, list[Injection]]]:
    model, injections = adapted("lora", "dora")
    with torch.no_grad():
        yield model.eval(), injections


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS)["logits"]
    return found


def test_every_form_of_a_choice(served: Any) -> None:
    model, (one, two) = served
    both = logits(model)
    average = Average(one.name, two.name)
    with activate(model, average):
        mean = logits(model)
    names = [two.name, None, one.name]
    rows = separately(model, IDS, names)
    assert torch.equal(using(model, one.name)(logits, model), separately(model, IDS, [one.name] * 3))
    assert torch.equal(using(model, two.name, one.name)(logits, model), both)
    assert torch.equal(using(model, None)(logits, model), separately(model, IDS, [None] * 3))
    assert torch.equal(using(model, average)(logits, model), mean)
    torch.testing.assert_close(using(model, names)(logits, model), rows)
    torch.testing.assert_close(using(model, tuple(names))(logits, model), rows)
    twice = IDS.repeat_interleave(2, 0)
    beams = using(model, names, copies=2)(lambda: model(twice)["logits"])
    torch.testing.assert_close(beams, rows.repeat_interleave(2, 0))
    assert torch.equal(logits(model), both)


def test_values_for_methods_come_to_what_is_active_or_named() -> None:
    model = host().eval()
    task = peftcore.apply(model, TaskMethod, name="task")
    base = using(model, None)(logits, model)
    with call(model, strength=2.0):
        strong = logits(model)
        assert torch.equal(using(model, "task")(logits, model), strong)  # values given before stay
        assert torch.equal(using(model, "task", strength=0.0)(logits, model), base)
        assert torch.equal(using(model, strength=0.0)(logits, model), base)
        assert torch.equal(using(model, ["task", "task", "task"], strength=0.0)(logits, model), base)
    assert torch.equal(using(model, strength=2.0)(logits, model), strong) and not torch.equal(strong, base)
    with pytest.raises(MissingContext):
        logits(model)
    told = using(model, strength=2.0)
    activate(model)
    assert torch.equal(told(logits, model), base)  # what is active in the call, not when it was made
    assert not task.active


def test_what_is_no_choice_is_refused_before_the_call(served: Any) -> None:
    model, (one, two) = served
    for wrong in ((), (None, one.name), ([one.name], two.name), (None, None), (3,)):
        with pytest.raises(ConfigError, match="which adapters act"):
            using(model, *wrong)
    with pytest.raises(UnknownInjection):
        using(model, "nowhere")
    with pytest.raises(RouteError):
        using(model, [])
    one.merge()
    for merged in ([one.name, None, None], Average(one.name, two.name)):
        with pytest.raises(MergeError, match="unmerge"):
            using(model, merged)
    one.unmerge()


def test_it_says_in_the_call_what_changed_since_it_was_made(served: Any) -> None:
    model, (one, two) = served
    second, rows = using(model, two.name), using(model, [one.name, two.name, None])
    wanted = second(logits, model)
    one.merge()
    with pytest.raises(MergeError, match="every row"):
        rows(logits, model)
    one.unmerge()
    two.remove()
    for gone in (second, rows):
        with pytest.raises(UnknownInjection):
            gone(logits, model)
    peftcore.apply(model, "dora", name=two.name)
    assert not torch.equal(second(logits, model), wanted)
    plain = using(model, None)
    for each in peftcore.injections(model).values():
        each.remove()
    base = logits(model)
    again = peftcore.apply(model, TaskMethod)
    assert torch.equal(plain(logits, model), base)  # of a state that is another one since
    again.remove()


def test_nothing_of_it_is_seen_elsewhere(served: Any) -> None:
    model, (one, _) = served
    both, alone = logits(model), using(model, one.name)(logits, model)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread is there

        def work() -> None:
            assert torch.equal(pool.submit(logits, model).result(), both)
            assert torch.equal(pool.submit(using(model, one.name), logits, model).result(), alone)
            assert torch.equal(logits(model), alone) and one.active

        using(model, one.name)(work)
    with pytest.raises(ZeroDivisionError):
        using(model, one.name)(lambda: 1 / 0)
    assert torch.equal(logits(model), both)


def test_streams_that_take_turns_step_by_step(served: Any) -> None:
    model, (one, two) = served

    def stream() -> Iterator[Tensor]:
        while True:
            yield logits(model)

    found: dict[str, list[Tensor]] = {one.name: [], two.name: []}
    steps = {name: (using(model, name), stream()) for name in found}
    for name in [one.name, two.name, two.name, one.name, two.name, one.name]:
        choose, generator = steps[name]
        found[name].append(choose(next, generator))
    for name, outputs in found.items():
        wanted = using(model, name)(logits, model)
        assert all(torch.equal(each, wanted) for each in outputs)


def test_threads_and_tasks_take_it_along(served: Any) -> None:
    model, (one, two) = served
    expected = {name: using(model, name)(logits, model) for name in (one.name, two.name)}
    wrong: list[str] = []

    def generate(name: str) -> None:
        if not all(torch.equal(logits(model), expected[name]) for _ in range(5)):
            wrong.append(name)

    threads = [threading.Thread(target=using(model, name), args=(generate, name)) for name in expected for _ in "123"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    async def request(name: str) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
            using(model, name)(generate, name)
            await asyncio.to_thread(using(model, name), generate, name)

    async def serve() -> None:
        await asyncio.gather(*(request(name) for name in expected for _ in "12"))

    asyncio.run(serve())
    assert not wrong


def test_what_runs_only_when_the_call_is_over_is_refused(served: Any) -> None:
    model, (one, _) = served

    def generator() -> Iterator[Tensor]:
        yield logits(model)

    async def coroutine() -> Tensor:
        return logits(model)

    with pytest.raises(BlockOrderError, match=r"\(next, generator\)"):
        using(model, one.name)(generator)
    with pytest.warns(RuntimeWarning, match="never awaited"), pytest.raises(BlockOrderError, match="coroutine"):
        using(model, one.name)(coroutine)
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(BlockOrderError, match="executors"):
            using(model, one.name)(pool.submit, done.wait)
        done.set()

    async def later() -> None:
        loop = asyncio.get_running_loop()
        scheduled: list[BaseException | Tensor] = []

        def late() -> None:
            try:
                scheduled.append(logits(model))
            except BlockOrderError as error:
                scheduled.append(error)

        using(model, one.name)(loop.call_soon, late)
        await asyncio.sleep(0)
        assert isinstance(scheduled[0], BlockOrderError)

    asyncio.run(later())


def test_without_adapters_it_is_a_call_like_any_other() -> None:
    model = nn.Linear(4, 4)
    x = torch.ones(1, 4)
    assert torch.equal(using(model, None)(model, x), model(x))
    assert torch.equal(using(model, task="rte")(model, x), model(x))
