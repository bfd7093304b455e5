"""Tools for checks: hosts with a single layer, models around a host, and functions that interrupt, interleave or count
calls."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftcore.contract.config import MethodConfig
from peftcore.contract.method import Method
from peftcore.registry.plugins import registry


class Holder(nn.Module):
    """A host with one layer, and an input for it."""

    def __init__(self, layer: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.example = example

    def forward(self) -> Tensor:
        output: Tensor = self.layer(self.example)
        return output


class ByKeyword(Holder):
    """A host that passes the input to its layer as a keyword argument."""

    def forward(self) -> Tensor:
        output: Tensor = self.layer(input=self.example)
        return output


def zoo() -> Iterator[tuple[str, Holder]]:
    """Yield hosts with a single layer, for all kinds of layers, each with a name. The layers have realistic shapes and
    options: overlapping patches, stride, padding, dilation, groups, no bias."""
    for bias in (True, False):
        for features in (7, 8):
            for shape in ((3, 8), (2, 3, 8), (2, 2, 3, 8), (1, 2, 2, 3, 8)):
                yield (
                    f"Linear(8, {features}) on {len(shape)}-D",
                    Holder(nn.Linear(8, features, bias=bias), torch.randn(shape)),
                )
        for groups in (1, 2):
            same: dict[str, Any] = {"bias": bias, "groups": groups}
            yield "Conv1d", Holder(nn.Conv1d(4, 6, 3, stride=2, padding=1, **same), torch.randn(2, 4, 9))
            yield "Conv1d same", Holder(nn.Conv1d(4, 6, 4, padding="same", dilation=2, **same), torch.randn(2, 4, 9))
            yield "Conv2d 1x1", Holder(nn.Conv2d(4, 4, 1, **same), torch.randn(2, 4, 5, 6))
            yield (
                "Conv2d",
                Holder(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), **same), torch.randn(2, 4, 7, 8)),
            )
            yield "Conv2d dilated", Holder(nn.Conv2d(4, 6, 3, padding=2, dilation=2, **same), torch.randn(2, 4, 7, 8))
            circular = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", **same)
            yield "Conv2d circular", Holder(circular, torch.randn(2, 4, 7, 8))
            yield "Conv3d", Holder(nn.Conv3d(4, 6, (1, 3, 2), **same), torch.randn(1, 4, 3, 4, 5))
            transposed = nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, **same)
            yield "ConvTranspose2d", Holder(transposed, torch.randn(2, 4, 5, 5))
    yield "Embedding", Holder(nn.Embedding(9, 6), torch.randint(9, (2, 5)))
    yield "Embedding with padding", Holder(nn.Embedding(9, 6, padding_idx=0), torch.arange(9))
    yield "LayerNorm", Holder(nn.LayerNorm(6), torch.randn(2, 3, 6))


class Wrapper(nn.Module):
    """A model that contains the host as a submodule, under any given name."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)
        self.inner = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(self.inner)(*args, **kwargs)


class Unused(nn.Module):
    """A model that contains the host, and a layer that is never called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.unused = nn.Linear(6, 6)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class Interrupted(Exception):
    """The error that checks raise to interrupt an operation."""


def interrupted(method: type[Method], stop: int | None) -> type[Method]:
    """Return a method class that does the same as `method`, but raises `Interrupted` when it builds operator number
    `stop`. If `stop` is None, it raises after all operators are installed."""

    def inject(self: Method, model: nn.Module, config: MethodConfig, surgeon: Any) -> None:
        left = [stop]
        build = surgeon._build

        def counting(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                raise Interrupted
            left[0] = None if left[0] is None else left[0] - 1
            return build(*args, **kwargs)

        surgeon._build = counting
        method().inject(model, config, surgeon)

    def trainable(self: Method, *args: Any) -> None:
        raise Interrupted

    members = {
        "name": method.name,
        "Config": method.Config,
        "tags": method.tags,
        "target": method.target,
        "alternatives": method.alternatives,
        "inject": inject,
    }
    members |= {"parameter_count": staticmethod(method.parameter_count), "trainable": trainable}
    return type(f"Interrupted{method.__name__}", (Method,), members)


class FailingAt(TorchFunctionMode):
    """Context manager that raises an error at call number `at` of a torch function. If `at` is negative, it only counts
    the calls."""

    def __init__(self, at: int, error: type[BaseException] = Interrupted) -> None:
        super().__init__()
        self.at, self.count, self.error = at, 0, error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.count == self.at:
            raise self.error
        self.count += 1
        return func(*args, **(kwargs or {}))


class Lockstep(TorchFunctionMode):
    """Context manager, one for each of two threads, that makes the threads alternate at every call of a torch function.
    So errors that are caused by shared state occur."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with suppress(threading.BrokenBarrierError):  # the other thread is done
            self.barrier.wait(5.0)
        return func(*args, **(kwargs or {}))


def together(*tasks: Callable[[], Tensor]) -> list[Any]:
    """Run tasks in separate threads, which alternate at every call of a torch function (see `Lockstep`). Return their
    results, or the errors that they raised."""
    barrier = threading.Barrier(len(tasks))
    results: list[Any] = [None] * len(tasks)

    def work(index: int) -> None:
        try:
            with Lockstep(barrier), torch.no_grad():
                results[index] = tasks[index]()
        except Exception as error:
            results[index] = error
        finally:
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@contextlib.contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Context manager that counts the calls of Python functions, as a measure of work that does not depend on time. It
    yields a list whose only entry is the count.

    The garbage collector is turned off within the block, so that finalizers of objects from earlier code are not
    counted.
    """
    count = [0]

    def profile(frame: FrameType, event: str, argument: object) -> None:
        count[0] += event == "call"

    before, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        yield count
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()


@contextmanager
def counted_hooks() -> Iterator[list[str]]:
    names: list[str] = []
    stop = registry().manager.add_hookcall_monitoring(
        lambda name, implementations, arguments: names.append(name),
        lambda outcome, name, implementations, arguments: None,
    )
    try:
        yield names
    finally:
        stop()


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin: nn.Module = torch.load(file, weights_only=False)
    return twin
