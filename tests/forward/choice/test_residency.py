"""Which adapters leave, and which stay: the least recently used ones leave, and none that somebody needs."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import token_ids, transformer
from torch import Tensor, nn

import peftcore
import peftcore.files.adapter_pool
from peftcore.errors import CheckpointError, MemoryLimit, UnknownInjection
from peftcore.forward.state.host_state import state_of
from peftcore.injection.idle_adapters import IdleTensor

IDS = token_ids()
NAMES = ("a", "b", "c", "d")
EACH = 2 * 4 * (2 * 8 * 8) * 4 // 2  # two layers, q and v, A and B of rank 8 and width 8, float32


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        injection = peftcore.apply(transformer(), "lora", seed=seed)
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.add_(0.1 * (seed + 1))
        injection.save(tmp_path / name)
    return tmp_path


@pytest.fixture
def served(folders: Path) -> tuple[nn.Module, peftcore.AdapterPool]:
    """A model of four adapters, with room for two."""
    model = transformer()
    pool = peftcore.keep_within(model, 2 * EACH, idle=folders / "idle")
    for name in NAMES:
        peftcore.load(model, folders / name, name=name, active=False)
    return model, pool


def bytes_alive(model: nn.Module) -> int:
    """The bytes of storages of adapters' tensors, of those that have values."""
    storages = {}
    for injection in peftcore.injections(model).values():
        for _, module in injection.modules():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.untyped_storage().nbytes():
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def test_the_bytes_are_those_of_the_tensors(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    assert pool.bytes == bytes_alive(model) == 2 * EACH
    pool.limit = EACH
    assert pool.bytes == bytes_alive(model) == EACH
    pool.limit = 0
    assert pool.bytes == bytes_alive(model) == 0


def test_the_least_recently_used_leave(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    assert (pool.resident, pool.idle) == (["c", "d"], ["a", "b"])
    for name, there in (("c", ["d", "c"]), ("a", ["c", "a"]), ("c", ["a", "c"]), ("b", ["c", "b"])):
        peftcore.using(model, name)(outputs, model)
        assert pool.resident == there


@pytest.mark.parametrize(
    "naming",
    [
        lambda model: peftcore.activate(model, "a"),
        lambda model: peftcore.route(model, ["a", None]),
        lambda model: peftcore.activate(model, peftcore.Sum("a", "b")),
        lambda model: peftcore.injections(model)["a"].enabled(),
    ],
    ids=["activate", "route", "composition", "enabled"],
)
def test_naming_one_brings_it_back_as_it_was(
    served: tuple[nn.Module, peftcore.AdapterPool], folders: Path, naming: Callable[[nn.Module], Any]
) -> None:
    model, pool = served
    parameters = list(peftcore.injections(model)["a"].parameters())
    plain = transformer()
    for name in NAMES:
        peftcore.load(plain, folders / name, name=name, active=False)
    with naming(model), naming(plain):
        assert "a" in pool.resident
        assert torch.equal(outputs(model), outputs(plain))
        assert pool.bytes <= 2 * EACH
    del parameters


def test_the_parameters_are_the_same_objects(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    first = peftcore.injections(model)["d"]
    before, values = list(first.parameters()), [each.clone() for each in first.parameters()]
    pool.rest("d")
    assert all(isinstance(each, IdleTensor) for each in first.parameters())
    assert all(
        each.untyped_storage().nbytes() == 0 and each.shape == value.shape
        for each, value in zip(before, values, strict=True)
    )
    pool.wake("d")
    assert all(a is b for a, b in zip(first.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, values, strict=True))


# ---------------------------------------------------------------------------------------------------------- who stays


def test_what_a_choice_in_force_names_stays(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    peftcore.activate(model, "a")
    with peftcore.activate(model, "b"):
        with pytest.raises(MemoryLimit, match=rf"'c' needs {EACH:,} bytes.*{2 * EACH:,} are taken.*'b', 'a'"):
            peftcore.using(model, "c")(outputs, model)
        assert peftcore.injections(model)["b"].active
        assert pool.rest("a", "b") == ["a", "b"]
    peftcore.using(model, "c")(outputs, model)
    assert pool.resident == ["a", "c"]


def test_a_statement_makes_room_for_the_next_one(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    pool.limit = EACH
    for name in ("a", "b", "a"):
        peftcore.activate(model, name)
        assert pool.resident == [name]
        outputs(model)


def test_a_block_upon_a_statement_needs_room_for_both(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    pool.limit = EACH
    peftcore.activate(model, "a")
    before = outputs(model)
    with pytest.raises(MemoryLimit), peftcore.activate(model, "b"):
        pytest.fail("entered")
    assert peftcore.injections(model)["a"].active
    assert pool.resident == ["a"]
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_a_forward_brings_back_what_is_chosen_and_not_there(
    served: tuple[nn.Module, peftcore.AdapterPool], part: bool
) -> None:
    model, pool = served

    def run() -> Tensor:
        with torch.no_grad():
            return model.layers[0](torch.ones(1, 3, 8)) if part else model(IDS)

    peftcore.activate(model, "a")
    before = run()
    record = pool.residency._records["a"]  # nothing takes it out while it is chosen, so this is done by hand
    record.here = False
    record.adapter.take_out()
    assert torch.equal(run(), before)
    assert "a" in pool.resident


def test_the_choice_before_stays_where_a_limit_refuses_one(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    peftcore.activate(model, "a")
    before = outputs(model)
    for naming in (
        lambda: peftcore.activate(model, "a", "b", "c"),
        lambda: peftcore.route(model, ["b", "c", "d"]),
        lambda: peftcore.using(model, ["b", "c"])(outputs, model),
    ):
        with pytest.raises(MemoryLimit, match="needs"):
            naming()
        assert torch.equal(outputs(model), before)
    assert pool.bytes <= 2 * EACH


def test_what_trains_or_is_merged_stays(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    adapters = peftcore.injections(model)
    adapters["a"].trainable()
    peftcore.activate(model, "b")
    adapters["b"].merge()
    assert pool.rest("a", "b") == ["a", "b"]
    adapters["a"].trainable(False)
    assert pool.rest("a", "b") == ["b"]
    adapters["b"].unmerge()
    peftcore.activate(model)
    assert pool.rest("b") == []


def test_what_trains_is_passed_over_when_another_comes(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    pool.wake("a", "b")  # the first one was used longest ago
    peftcore.injections(model)["a"].trainable()
    pool.wake("c")
    assert pool.resident == ["a", "c"]
    peftcore.injections(model)["c"].trainable()
    with pytest.raises(MemoryLimit, match=f"{2 * EACH:,} are taken by adapters that cannot be offloaded now: 'a', 'c'"):
        pool.wake("d")
    assert pool.resident == ["a", "c"]


def test_what_is_merged_stays_though_no_choice_names_it(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    merged = peftcore.injections(model)["a"]
    with peftcore.activate(model, "a"):
        merged.merge()
    assert pool.rest("a") == ["a"]
    merged.unmerge()
    assert pool.rest("a") == []


def test_what_somebody_holds_stays(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    state = state_of(model)
    assert state is not None
    with state.kept("a"):
        assert "a" in pool.resident
        peftcore.using(model, "b")(outputs, model)
        with pytest.raises(MemoryLimit):
            peftcore.using(model, ["c", "d"])(outputs, model)
        assert pool.rest("a", "b") == ["a"]
    assert pool.rest("a") == []


def test_what_another_thread_has_chosen_stays(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    chosen, done = threading.Event(), threading.Event()

    def work() -> None:
        peftcore.activate(model, "a")
        chosen.set()
        done.wait()

    worker = threading.Thread(target=work)
    worker.start()
    chosen.wait()
    assert pool.rest("a") == ["a"]
    done.set()
    worker.join()
    assert pool.rest("a") == []


def test_what_a_task_chose_in_a_block_of_another_one_stays(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served

    async def child(chosen: asyncio.Event, done: asyncio.Event) -> None:
        peftcore.activate(model, "a")
        chosen.set()
        await done.wait()

    async def parent() -> None:
        chosen, done = asyncio.Event(), asyncio.Event()
        with peftcore.activate(model, "b"):
            task = asyncio.create_task(child(chosen, done))
            await chosen.wait()
            assert pool.rest("a", "b") == ["a", "b"]
            done.set()
            await task

    asyncio.run(parent())


def test_what_a_forward_follows_stays_though_the_choice_is_another_one_by_now(
    served: tuple[nn.Module, peftcore.AdapterPool], folders: Path
) -> None:
    model, pool = served
    pool.limit = 3 * EACH
    peftcore.activate(model, "a")
    expected, found = outputs(model), []
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        begun.set()
        go_on.wait()

    hook = model.layers[0].register_forward_pre_hook(wait)
    worker = threading.Thread(target=lambda: found.append(outputs(model)))
    worker.start()
    begun.wait()
    peftcore.activate(model, "b")
    stayed = pool.rest("a")
    go_on.set()
    worker.join()
    hook.remove()
    assert stayed == ["a"]
    assert torch.equal(found[0], expected)
    assert pool.rest("a") == []


def test_a_forward_that_was_interrupted_keeps_nothing(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    peftcore.activate(model, "a")
    hook = model.layers[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    hook.remove()
    peftcore.activate(model, "b")
    outputs(model)
    assert pool.rest("a") == []
    state = state_of(model)
    assert state is not None
    assert not state.running


# --------------------------------------------------------------------------------------------------------- come and go


def test_a_new_adapter_needs_room_too(served: tuple[nn.Module, peftcore.AdapterPool], folders: Path) -> None:
    model, pool = served
    new = peftcore.apply(model, "lora", name="new")
    assert pool.resident == ["d", "new"]
    peftcore.activate(model, "a", "new")
    with pytest.raises(MemoryLimit, match="'more' needs"):
        peftcore.load(model, folders / "b", name="more", active=False)
    with pytest.raises(MemoryLimit, match="'more' needs"):
        peftcore.apply(model, "lora", name="more")
    assert list(peftcore.injections(model)) == [*NAMES, "new"]
    peftcore.activate(model)
    new.remove()
    assert pool.bytes == bytes_alive(model) == EACH


def test_the_limit_outlives_the_last_adapter(served: tuple[nn.Module, peftcore.AdapterPool], folders: Path) -> None:
    model, pool = served
    for injection in peftcore.injections(model).values():
        injection.remove()
    outputs(model)
    assert (pool.resident, pool.idle, pool.bytes) == ([], [], 0)
    for name in NAMES:
        peftcore.load(model, folders / name, name=name, active=False)
    assert len(pool.resident) == 2
    for injection in peftcore.injections(model).values():
        injection.remove()
    pool.end()
    assert state_of(model) is None


def test_names_that_are_gone_are_errors_as_ever(served: tuple[nn.Module, peftcore.AdapterPool]) -> None:
    model, pool = served
    chosen = peftcore.using(model, "a")
    peftcore.injections(model)["a"].remove()
    with pytest.raises(UnknownInjection):
        chosen(outputs, model)
    with pytest.raises(UnknownInjection):
        pool.wake("a")
    with pytest.raises(UnknownInjection):
        pool.rest("a")


def test_threads_that_name_different_ones_at_once_are_all_right(
    served: tuple[nn.Module, peftcore.AdapterPool], folders: Path
) -> None:
    model, pool = served
    pool.limit = 3 * EACH
    expected = {}
    for name in NAMES:
        plain = transformer()
        peftcore.load(plain, folders / name)
        expected[name] = outputs(plain)
    wrong: list[Any] = []

    def work(first: int) -> None:
        for turn in range(25):
            name = NAMES[(first + turn * (1 + first)) % 4]
            try:
                if not torch.equal(peftcore.using(model, name)(outputs, model), expected[name]):
                    wrong.append(name)
            except Exception as error:
                wrong.append(error)
            if pool.bytes > 3 * EACH:
                wrong.append(pool.bytes)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_nobody_waits_for_a_disk_who_names_what_is_there(
    served: tuple[nn.Module, peftcore.AdapterPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pool = served
    reading, go_on = threading.Event(), threading.Event()
    read = peftcore.files.adapter_pool.FolderStore.values

    def slowly(*args: Any) -> Any:
        reading.set()
        assert go_on.wait(10)
        return read(*args)

    monkeypatch.setattr(peftcore.files.adapter_pool.FolderStore, "values", slowly)
    worker = threading.Thread(target=peftcore.using(model, "a"), args=(outputs, model))
    worker.start()
    reading.wait()
    peftcore.using(model, "d")(outputs, model)  # while the other one reads
    assert worker.is_alive()
    go_on.set()
    worker.join()
    assert pool.resident == ["a", "d"] or pool.resident == ["d", "a"]


def test_without_a_limit_a_forward_asks_for_none() -> None:
    model = transformer()
    peftcore.apply(model, "lora")
    state = state_of(model)
    assert state is not None
    assert state.residency is None
    assert isinstance(state.kept("lora"), nullcontext)


def test_a_damaged_one_leaves_everything_as_it_was(
    served: tuple[nn.Module, peftcore.AdapterPool], folders: Path
) -> None:
    model, pool = served
    peftcore.activate(model, "d")
    before, there = outputs(model), pool.resident
    (file,) = (folders / "idle").rglob("0.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="was changed"):
        peftcore.activate(model, "a")
    assert torch.equal(outputs(model), before)
    assert sorted(pool.resident) == sorted(there)
