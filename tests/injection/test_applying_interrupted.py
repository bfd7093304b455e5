"""Ctrl-C and errors of torch while adapters of several methods are loaded and combined: the model is as it was, or the
adapter is there whole, and the next try succeeds."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from core_toys import run_without_gradients, snapshot, stir, token_ids, transformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftcore

AT = {"target": ["attn.q", "attn.v"]}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 2, **AT}),
    "pissa": ("pissa", {"rank": 2, **AT}),
    "bitfit": ("bitfit", {}),
    "prefix_tuning": ("prefix_tuning", {}),
    "hybrid": (["lora", "ia3"], {}),
}
SLOW = ("pissa", "bitfit")
MOST = 10_000


def adapted(method: str, *names: str) -> nn.Module:
    model = transformer()
    kind, options = METHODS[method]
    for index, name in enumerate(names):
        stir(peftcore.apply(model, kind, name=name, **options), seed=index + 1)
    return model


def load(method: str, path: Path) -> tuple[nn.Module, Callable[[], object]]:
    peftcore.injections(adapted(method, "saved"))["saved"].save(path)
    model = transformer()
    return model, lambda: peftcore.load(model, path, name="new")


def combine(method: str, path: Path) -> tuple[nn.Module, Callable[[], object]]:
    model = adapted(method, "a", "b")
    return model, lambda: peftcore.combine(model, {"a": 0.5, "b": 0.5}, how="linear", name="new")


def apply(method: str, path: Path) -> tuple[nn.Module, Callable[[], object]]:
    model, (kind, options) = transformer(), METHODS[method]
    return model, lambda: peftcore.apply(model, kind, name="new", seed=3, **options)


def state(model: nn.Module) -> dict[str, Any]:
    found = peftcore.injections(model)
    return snapshot(model) | {"names": [*found], "active": [name for name, each in found.items() if each.active]}


class Kernels(TorchDispatchMode):
    """Lets the n-th operation of torch fail."""

    def __init__(self, left: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.error = left, error

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("door", [load, combine])
@pytest.mark.parametrize(
    "method", [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in METHODS]
)
def test_an_operation_that_fails_leaves_nothing(
    method: str, door: Callable[..., Any], error: type[BaseException], tmp_path: Path
) -> None:
    model, enter = door(method, tmp_path)
    before, failed = state(model), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(1, MOST):
            try:
                with Kernels(n, error):
                    enter()
                break
            except (error, peftcore.errors.PeftcoreError):  # of safetensors, which says it in its own words
                failed += 1
            now = state(model)
            assert [key for key in before if now[key] != before[key]] == [], n
    assert failed > 20
    assert [*peftcore.injections(model)] == [*before["names"], "new"]


class Interrupted:
    """Raises KeyboardInterrupt at the n-th call of a function of the core since the installing began, where Python
    looks for signals."""

    def __init__(self, left: int, since: str) -> None:
        self.left, self.since, self.where = left, since, ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        self.since = "" if code.co_name == self.since else self.since
        if not self.since and "/peftcore/" in code.co_filename and self.left:
            self.left -= 1
            if not self.left:
                self.where = f"{Path(code.co_filename).name}:{code.co_name}"
                raise KeyboardInterrupt


@contextmanager
def tracing(function: Any) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(function)
    try:
        yield
    finally:
        sys.settrace(before)


SINCE = [pytest.param("ensure_state", id="installing"), pytest.param("", id="all", marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore")  # of generators that are interrupted as they are closed
@pytest.mark.parametrize("since", SINCE)
@pytest.mark.parametrize("door", [apply, load, combine])
def test_an_interrupt_leaves_all_or_nothing(door: Callable[..., Any], since: str, tmp_path: Path) -> None:
    model, enter = door("lora", tmp_path / "0")
    before, here = state(model), run_without_gradients(model, token_ids())
    whole, complete = door("lora", tmp_path / "1")
    complete()
    there = run_without_gradients(whole, token_ids())
    failed = 0
    for n in range(1, MOST):
        interrupted = Interrupted(n, since)
        try:
            with tracing(interrupted):
                enter()
        except KeyboardInterrupt:
            failed += 1
        if "new" in peftcore.injections(model):  # all was done, or the interrupt was lost
            output = run_without_gradients(model, token_ids())
            assert torch.equal(output, there), interrupted.where
            if interrupted.left:
                break
            peftcore.injections(model)["new"].remove()
            if before["names"]:
                peftcore.activate(model, *before["names"])
        now = state(model)
        assert [key for key in before if now[key] != before[key]] == [], interrupted.where
    assert failed > 100
    peftcore.injections(model)["new"].remove()
    if before["names"]:
        peftcore.activate(model, *before["names"])
    assert torch.equal(run_without_gradients(model, token_ids()), here)


@pytest.mark.parametrize("door", [apply, load, combine])
def test_what_fails_last_is_undone_too(
    door: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(methods: object) -> None:
        raise OSError("the evidence cannot be read")

    model, enter = door("lora", tmp_path)
    before = state(model)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="evidence"):
        patch.setattr("peftcore.injection.applying.notice_equation_only", unread)
        enter()
    now = state(model)
    assert [key for key in before if now[key] != before[key]] == []
    enter()
