"""Every change of a model that the journal records, with each of its writes failing in turn by an error or by Ctrl-C,
before or after the write: the model is as it was, and the next try succeeds."""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_toys import run_without_gradients, snapshot, stir, token_ids, transformer
from torch import nn

import peftcore
from peftcore.errors import CheckpointError
from peftcore.forward.state.host_state import HostState, state_of
from peftcore.forward.state.slot import slot_of
from peftcore.utils.journal import Entry, Journal

AT = {"target": ["attn.q", "mlp.up"]}
MOST = 3000


def host(*names: str, method: str = "lora", **options: Any) -> nn.Module:
    """A model that trains in part, with adapters that act."""
    model = transformer()
    model.norm.requires_grad_(False)
    model.layers[0].register_forward_hook(lambda *_: None)
    for index, name in enumerate(names):
        stir(peftcore.apply(model, method, name=name, **(AT | options)), seed=index + 1)
    model.register_forward_pre_hook(lambda *_: None)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    return model


def folder(path: Path) -> Path:
    peftcore.injections(host("other", "saved"))["saved"].save(path / "saved")
    return path / "saved"


def a(model: nn.Module) -> peftcore.Injection:
    return peftcore.injections(model)["a"]


def merged(*names: str, keep: Any = "cpu", **options: Any) -> nn.Module:
    model = host(*names, **options)
    a(model).merge(keep)
    return model


def configured() -> nn.Module:
    model = host()
    model.config = SimpleNamespace(num_hidden_layers=2, layer_types=["full", "sliding"])
    return model


def frozen() -> nn.Module:
    model = host("a")
    a(model).trainable(False)
    return model


def loss(model: nn.Module) -> torch.Tensor:
    return model(token_ids()).square().sum()


Change = Callable[[nn.Module, Path], object]
CHANGES: dict[str, tuple[Callable[[], nn.Module], Change]] = {
    "apply the first": (host, lambda model, path: peftcore.apply(model, "lora", name="new", **AT)),
    "apply another": (lambda: host("a"), lambda model, path: peftcore.apply(model, "dora", name="new", train=["norm"])),
    "apply inside attention": (
        lambda: host("a"),
        lambda model, path: peftcore.apply(model, ["lora", "ia3"], name="new", target="all-linear"),
    ),
    "apply after looking at data": (
        lambda: host("a"),
        lambda model, path: peftcore.apply(model, "lora_ga", name="new", rank=2, data=[loss], **AT),
    ),
    "load the first": (host, lambda model, path: peftcore.load(model, path, name="new", trainable=True)),
    "load another": (lambda: host("a"), lambda model, path: peftcore.load(model, path, name="new", active=False)),
    "combine": (
        lambda: host("a", "b"),
        lambda model, path: peftcore.combine(model, {"a": 0.5, "b": 0.5}, how="linear", name="new"),
    ),
    "combine with a folder": (
        lambda: host("a"),
        lambda model, path: peftcore.combine(model, {"a": 1.0, str(path): 1.0}, name="new"),
    ),
    "limit the memory": (
        lambda: host("a"),
        lambda model, path: peftcore.keep_within(model, "1GB", idle=path.parent / "idle"),
    ),
    "limit the memory for adapters to come": (
        host,
        lambda model, path: peftcore.keep_within(model, "1GB", idle=path.parent / "idle"),
    ),
    "to_lora": (lambda: host("a"), lambda model, path: peftcore.to_lora(a(model), 1, name="new")),
    "remove the last": (lambda: host("a"), lambda model, path: a(model).remove()),
    "remove the first of two": (lambda: host("a", "b"), lambda model, path: a(model).remove()),
    "remove the second of two": (lambda: host("b", "a"), lambda model, path: a(model).remove()),
    "remove a merged one": (lambda: merged("a", "b"), lambda model, path: a(model).remove()),
    "bake the last": (lambda: host("a"), lambda model, path: a(model).bake()),
    "bake one of two": (lambda: host("a", "b"), lambda model, path: a(model).bake()),
    "bake a merged one": (lambda: merged("a", keep=None), lambda model, path: a(model).bake()),
    "merge": (lambda: host("a", "b"), lambda model, path: a(model).merge("device")),
    "merge into a record": (lambda: host("a"), lambda model, path: a(model).merge("record")),
    "unmerge": (lambda: merged("a"), lambda model, path: a(model).unmerge()),
    "quantize": (lambda: host("a"), lambda model, path: peftcore.quantize(model, "int8")),
    "dequantize": (lambda: peftcore.quantize(host("a"), "int8"), lambda model, path: peftcore.dequantize(model)),
    "swap": (lambda: host("a"), lambda model, path: a(model).swap(path)),
    "freeze": (lambda: host("a"), lambda model, path: a(model).trainable(False)),
    "train again": (frozen, lambda model, path: a(model).trainable()),
    "replicate": (configured, lambda model, path: peftcore.replicate_layers(model, [[0, 2], [1, 2]])),
}


def look(model: nn.Module) -> dict[str, Any]:
    """All of a model that is to be as before, with peftcore's own records of it."""
    output = run_without_gradients(model, token_ids()).tolist()
    state = state_of(model) or HostState()
    tables = {
        path: [list(table) for name, table in vars(module).items() if isinstance(table, dict)]
        for path, module in model.named_modules()
    }
    slots = {path: slot for path, module in model.named_modules() if (slot := slot_of(module)) is not None}
    methods = {
        path: [value for value in vars(module).values() if callable(value)] for path, module in model.named_modules()
    }
    watched = state.watched
    return snapshot(model) | {
        "parameters": [(name, id(value), value.requires_grad) for name, value in model.named_parameters()],
        "tables": tables,
        "gradients": [(name, id(value.grad)) for name, value in model.named_parameters()],
        "limited": state.residency is not None,
        "methods": methods,
        "config": vars(model.config).copy() if hasattr(model, "config") else None,
        "state": id(state_of(model)),
        "injections": [(name, each.active, each.merged, each._chosen) for name, each in state.injections.items()],
        "frozen": [id(each) for each in state.frozen],
        "reads_tokens": state.reads_tokens,
        "choice": (state.choice.active, state.choice.route, state.choice.composition),
        "tables of tokens": watched and list(watched.tables),
        "watched": watched
        and sorted({*watched.new, *(name for sites in watched.waiting[False].values() for name in sites)}),
        "slots": [(path, slot, list(slot.mounts), slot.forced_attributes) for path, slot in slots.items()],
        "order": sorted(map(id, state.slots)) == sorted(map(id, slots.values())) and list(state.slots),
        "output": output,
    }


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_write_that_fails_leaves_nothing(
    change: str, late: bool, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, run = CHANGES[change]
    path, model = folder(tmp_path), make()
    run_without_gradients(model, token_ids())
    before, left, stops = look(model), 0, 0
    do = Journal._do

    def failing(journal: Journal, entry: Entry) -> None:
        nonlocal left
        left -= 1
        if left or late:
            do(journal, entry)
        else:
            journal.entries.append(entry)  # recorded, and not written
        if not left:
            raise error("a write")

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(Journal, "_do", failing)
        for n in range(1, MOST):
            left = n
            try:
                run(model, path)
                break
            except (error, CheckpointError):  # reading a file, errors get their own words
                stops += 1
            left = 0
            now = look(model)
            assert [key for key in before if now[key] != before[key]] == [], n
    assert stops > 0
    after = look(model)
    assert any(after[key] != before[key] for key in before if key != "output")


def test_an_idle_adapter_whose_removal_fails_can_be_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = host("a", "b")
    peftcore.activate(model, "a")
    output = run_without_gradients(model, token_ids())
    peftcore.activate(model, "b")
    a(model).trainable(False)
    pool = peftcore.keep_within(model, "1GB", idle=tmp_path)
    assert pool.rest("a") == []
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        patch.setattr(HostState, "forget", stopping)
        a(model).remove()
    assert pool.idle == ["a"]
    peftcore.activate(model, "a")
    assert torch.equal(run_without_gradients(model, token_ids()), output)
    peftcore.activate(model, "b")
    pool.rest("a")
    a(model).remove()
    assert pool.idle == [] and pool.resident == ["b"]


def test_an_adapter_whose_removal_in_another_thread_fails_acts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = host("a")
    before = look(model)
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError, match="stop"):
        patch.setattr("peftcore.injection.injection.drop_state", stopping)
        thread.submit(a(model).remove).result()
    now = look(model)
    assert [key for key in before if now[key] != before[key]] == []


def stopping(*_: object) -> None:
    raise RuntimeError("stop")
