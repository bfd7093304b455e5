"""Locks of models: one thread changes a model at a time, whatever ends a change."""

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from core_toys import Shift, perceptron, transformer
from torch import nn

import peftcore
from peftcore.layers import model_locks
from peftcore.layers.model_locks import changing


@contextmanager
def held_elsewhere(*models: nn.Module) -> Iterator[None]:
    """Another thread holds the locks of models."""
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with changing(*models):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    try:
        yield
    finally:
        done.set()
        thread.join()


def waits(function: Any, *arguments: Any) -> bool:
    """Whether a function has to wait; it runs on in its thread."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    thread.join(0.2)
    return thread.is_alive()


def goes_on(function: Any, *arguments: Any) -> bool:
    """Whether a function of another thread ends."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


def enter(*models: nn.Module) -> None:
    with changing(*models):
        pass


def test_one_thread_at_a_time_changes_a_model_its_parts_and_what_shares_modules_with_it() -> None:
    model = transformer()
    other = nn.Sequential(model.layers[1], nn.Linear(8, 8))
    with held_elsewhere(model):
        assert waits(enter, model) and waits(enter, model.layers[0]) and waits(enter, other)
        assert goes_on(enter, perceptron())
    with held_elsewhere(other):
        assert waits(enter, model)
    assert goes_on(enter, model) and goes_on(enter, other)


def test_a_model_whose_parts_were_changed_before_takes_all_their_locks() -> None:
    parts = perceptron(), perceptron()
    for part in parts:
        enter(part)
    model = nn.ModuleList(parts)
    for part in parts:
        with held_elsewhere(part):
            assert waits(enter, model)
    with held_elsewhere(model):
        assert all(waits(enter, part) for part in parts)
    with changing(model), changing(parts[0]), changing(*reversed(parts)):
        pass
    assert goes_on(enter, parts[0]) and goes_on(enter, model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_whatever_ends_a_change_the_next_thread_goes_on(error: type[BaseException]) -> None:
    parts = perceptron(), perceptron()
    enter(parts[0])
    enter(parts[1])
    for model in (*parts, nn.ModuleList(parts)):
        with pytest.raises(error), changing(model):
            raise error
        assert goes_on(enter, model)


def test_one_lock_that_fails_releases_those_before_it() -> None:
    class Fails:
        def __enter__(self) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None:
            raise AssertionError

    lock = threading.RLock()
    with pytest.raises(KeyboardInterrupt), model_locks._Several([lock, Fails()]):
        pass
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lock.acquire, False).result()


def test_a_copy_and_a_pickle_have_a_lock_of_their_own() -> None:
    model = perceptron()
    injection = peftcore.apply(model, Shift, target="first")
    with changing(model):
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with held_elsewhere(model):
        for twin in twins:
            assert goes_on(peftcore.injections(twin)[injection.name].remove)
            assert not peftcore.injections(twin)


def test_locks_end_with_their_modules_and_leave_nothing_on_them() -> None:
    gc.collect()
    before = len(model_locks._LOCKS)
    model = perceptron()
    tables = {path: set(vars(module)) for path, module in model.named_modules()}
    enter(model)
    assert len(model_locks._LOCKS) > before
    assert tables == {path: set(vars(module)) for path, module in model.named_modules()}
    del model
    gc.collect()
    assert len(model_locks._LOCKS) == before


def test_modules_of_adapters_have_no_lock() -> None:
    model = transformer()
    peftcore.apply(model, Shift, target="attn.q")
    enter(model)
    assert not any(isinstance(each, Shift) for each in model_locks._LOCKS)
    assert all(each.peft not in model_locks._LOCKS for each in model.modules() if "peft" in each._modules)


CHANGES: dict[str, Any] = {
    "apply": lambda model: peftcore.apply(model, Shift, name="new", target="first"),
    "plan": lambda model: peftcore.plan(model, Shift, target="first"),
    "remove": lambda model: peftcore.injections(model)["a"].remove(),
    "merge": lambda model: peftcore.injections(model)["a"].merge(),
    "unmerge": lambda model: peftcore.injections(model)["a"].unmerge(),
    "bake": lambda model: peftcore.injections(model)["a"].bake(),
    "trainable": lambda model: peftcore.injections(model)["a"].trainable(False),
    "low_memory": lambda model: setattr(peftcore.injections(model)["a"], "low_memory", True),
    "swap": lambda model: peftcore.injections(model)["a"].swap(peftcore.injections(model)["a"].state_dict()),
    "disabled": lambda model: peftcore.injections(model)["a"].disabled().__enter__(),
    "save": lambda model: peftcore.injections(model)["a"].save("/dev/null/nowhere"),
    "dequantize": peftcore.dequantize,
    "deltas": lambda model: peftcore.deltas(peftcore.injections(model)["a"]),
    "combine": lambda model: peftcore.combine(model, {"a": 1.0}),
    "gather": lambda model: peftcore.gather(model, "task_arithmetic", {"a": 1.0}),
    "to_lora": lambda model: peftcore.to_lora(peftcore.injections(model)["a"], 1),
    "replicate_layers": lambda model: peftcore.replicate_layers(model, [[0, 1]]),
    "keep_within": lambda model: peftcore.keep_within(model, "1GB", idle="/dev/null/nowhere"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_each_change_waits_for_the_others(change: str) -> None:
    model = perceptron()
    peftcore.apply(model, Shift, name="a", target="first")

    def run() -> None:
        with suppress(Exception):  # some are refused, after they waited
            CHANGES[change](model)

    with held_elsewhere(model):
        assert waits(run)


def test_forwards_and_choices_do_not_wait() -> None:
    model, x = perceptron(), torch.randn(2, 4)
    peftcore.apply(model, Shift, name="a", target="first")
    with held_elsewhere(model):
        assert goes_on(model, x)
        assert goes_on(peftcore.activate, model, "a")
        assert goes_on(peftcore.using(model, None), model, x)
