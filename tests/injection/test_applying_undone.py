"""Every door through which an adapter comes into a model, with each tensor operation failing in turn: the model and its
other adapters are as they were, and the next try succeeds."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import run_without_gradients, snapshot, stir, token_ids, transformer
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import peftcore

LORA = {"rank": 2, "target": ["attn.q", "attn.v"]}
MOST = 4000


class Stop(Exception):
    """An operation that fails."""


class Countdown:
    """Lets the n-th operation fail."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


class Kernels(Countdown, TorchDispatchMode):
    """Lets the n-th operation that reads or writes tensors fail, as when memory runs out."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.step()
        return function(*args, **(kwargs or {}))


class Calls(Countdown, TorchFunctionMode):
    """Lets the n-th call of torch fail."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch._C._set_grad_enabled and getattr(function, "__name__", "") != "__get__":
            self.step()
        return function(*args, **(kwargs or {}))


def host(*names: str) -> nn.Module:
    """A model, with adapters that act."""
    model = transformer()
    for index, name in enumerate(names):
        stir(peftcore.apply(model, "lora", name=name, **LORA), seed=index + 1)
    return model


def folder(path: Path, method: str = "lora", **options: Any) -> Path:
    model = transformer()
    injection = peftcore.apply(model, method, **({**LORA} | options))
    stir(injection)
    injection.save(path / method)
    return path / method


Door = Callable[[nn.Module, Path], object]
DOORS: dict[str, tuple[tuple[str, ...], Door]] = {
    "apply": ((), lambda model, path: peftcore.apply(model, "dora", **LORA)),
    "load": ((), lambda model, path: peftcore.load(model, path)),
    "load, trainable": ((), lambda model, path: peftcore.load(model, path, trainable=True)),
    "load beside others": (("a", "b"), lambda model, path: peftcore.load(model, path, name="new")),
    "load with room": (("a",), lambda model, path: peftcore.load(model, path, name="new", room={"rank": 4})),
    "load, idle": (("a",), lambda model, path: peftcore.load(model, path, name="new", active=False)),
    "mean": (("a", "b"), lambda model, path: peftcore.combine(model, {"a": 0.5, "b": 0.5}, how="linear", name="new")),
    "ranks": (("a", "b"), lambda model, path: peftcore.combine(model, {"a": 0.5, "b": 0.5}, how="cat", name="new")),
    "of a folder": (("a",), lambda model, path: peftcore.combine(model, {"a": 1.0, str(path): 1.0}, how="cat")),
    "to lora": (("a",), lambda model, path: peftcore.to_lora(peftcore.injections(model)["a"], 1, name="new")),
    "gather": (("a", "b"), lambda model, path: peftcore.gather(model, "task_arithmetic", {"a": 1.0, "b": 2.0})),
}


def state(model: nn.Module) -> dict[str, Any]:
    found = peftcore.injections(model)
    return snapshot(model) | {"names": [*found], "active": [name for name, each in found.items() if each.active]}


@pytest.mark.parametrize("mode", [Kernels, pytest.param(Calls, marks=pytest.mark.slow)])
@pytest.mark.parametrize("door", DOORS)
def test_nothing_stays_of_what_failed(door: str, mode: type[Any], tmp_path: Path) -> None:
    names, enter = DOORS[door]
    path, model = folder(tmp_path), host(*names)
    before, output = state(model), run_without_gradients(model, token_ids())
    failed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(1, MOST):
            try:
                with mode(n):
                    enter(model, path)
                break
            except (Stop, peftcore.errors.PeftcoreError):
                failed += 1
            now = state(model)
            assert [key for key in before if now[key] != before[key]] == [], n
    assert failed > 3, "operations failed"
    assert len(peftcore.injections(model)) == len(names) + 1
    run_without_gradients(model, token_ids())
    for name in [*peftcore.injections(model)][len(names) :]:
        peftcore.injections(model)[name].remove()
    if names:
        peftcore.activate(model, *names)
    assert torch.equal(run_without_gradients(model, token_ids()), output)


def quantized(path: Path) -> nn.Module:
    return peftcore.quantize(host("a"), "int8")


def merged(path: Path) -> nn.Module:
    model = host("a", "b")
    peftcore.injections(model)["a"].merge()
    return model


Change = Callable[[nn.Module, peftcore.Injection, Path], object]
CHANGES: dict[str, tuple[Callable[[Path], nn.Module], Change]] = {
    "swap": (lambda path: host("a"), lambda model, a, path: a.swap(path)),
    "swap with another one": (
        lambda path: host("a", "b"),
        lambda model, a, path: a.swap(peftcore.injections(model)["b"]),
    ),
    "merge": (lambda path: host("a", "b"), lambda model, a, path: a.merge()),
    "bake": (lambda path: host("a", "b"), lambda model, a, path: a.bake()),
    "unmerge": (merged, lambda model, a, path: a.unmerge()),
    "quantize": (lambda path: host("a"), lambda model, a, path: peftcore.quantize(model, "int8")),
    "dequantize": (quantized, lambda model, a, path: peftcore.dequantize(model)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_model_does_so_as_a_whole(change: str, tmp_path: Path) -> None:
    make, run = CHANGES[change]
    path, failed = folder(tmp_path), 0
    model = make(path)
    before = state(model) | {"parameters": None}  # values are written back, which torch counts
    for n in range(1, MOST):
        try:
            with Kernels(n):
                run(model, peftcore.injections(model)["a"], path)
            break
        except (Stop, peftcore.errors.PeftcoreError):
            failed += 1
        now = state(model) | {"parameters": None}
        assert [key for key in before if now[key] != before[key]] == [], n
    assert failed > 3 and state(model)["bits"] != before["bits"]
