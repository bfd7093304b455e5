"""Records one forward: the order in which modules ran, outputs of matrices, and the operands of every softmax
attention.

Attention is recognized by its arithmetic, not by its module. It is a call of scaled_dot_product_attention, or a
product, a softmax of the product, and a second product with the softmax. Outputs of matrices are recorded instead of
weights, because several layers may use one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Inputs = Mapping[str, Any] | tuple[Any, ...]

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
)
_SOFTMAX: frozenset[str] = frozenset({"softmax", "_softmax"})
_SHALLOW = 40  # autograd nodes between a softmax and its product: masking, dropout, reshaping


@dataclass(frozen=True, slots=True)
class MatrixOutput:
    """The output of a matrix, with the time at which the matrix ran."""

    value: Tensor
    time: int


@dataclass(frozen=True, slots=True)
class RunningModule:
    """A module that is running."""

    path: str
    time: int


@dataclass(slots=True)
class AttentionEvent:
    """The operands of one attention, the modules that were running, and the earlier outputs of matrices."""

    frames: tuple[RunningModule, ...]
    operands: dict[str, Tensor]
    outputs: dict[str, MatrixOutput]


@dataclass(slots=True)
class DownEvent:
    """The input of a down matrix, and the outputs of the matrices before it."""

    path: str
    value: Tensor
    outputs: dict[str, MatrixOutput]


@dataclass(slots=True)
class Recording:
    """All events of one forward."""

    result: Any = None
    first_call: dict[str, int] = field(default_factory=dict)
    attentions: list[AttentionEvent] = field(default_factory=list)
    downs: list[DownEvent] = field(default_factory=list)


def record(model: nn.Module, inputs: Inputs, matrices: frozenset[str], downs: frozenset[str]) -> Recording:
    """Run the model once and return its recording. The caller must have made the model `differentiable`."""
    recorder = _Recorder(matrices, downs)
    try:
        recorder.watch(model)
        with recorder:
            result = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    finally:
        recorder.unwatch()
    recorder.recording.result = result
    return recorder.recording


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Context manager in which the model is in evaluation mode, and every floating-point parameter has requires_grad;
    all flags are restored afterwards."""
    training = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in training.items():
            module.training = mode


class _Recorder(TorchFunctionMode):
    def __init__(self, matrices: frozenset[str], downs: frozenset[str]) -> None:
        super().__init__()
        self.recording = Recording()
        self._matrices = matrices
        self._downs = downs
        self._time = 0
        self._frames: list[RunningModule] = []
        self._outputs: dict[str, MatrixOutput] = {}
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []
        self._softmax: tuple[Tensor, Tensor, int] | None = None  # input, output, number of products before
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leaving(path), always_call=True))

    def unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._time += 1
            self.recording.first_call.setdefault(path, self._time)
            self._frames.append(RunningModule(path, self._time))
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if path in self._downs and given is not None:
                self.recording.downs.append(DownEvent(path, given, dict(self._outputs)))

        return hook

    def _leaving(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._time += 1
            while self._frames and self._frames.pop().path != path:
                pass
            if path in self._matrices and isinstance(output, Tensor):
                self._outputs[path] = MatrixOutput(output, self._time)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            q, k, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
            self._attend(q, k, v)
        elif getattr(func, "__name__", "") in _SOFTMAX and isinstance(output, Tensor) and output.dim() >= 3:
            self._softmax = args[0] if args else kwargs["input"], output, len(self._products)
        elif (factors := product_factors(func, args, kwargs)) is not None and isinstance(output, Tensor):
            self._multiply(*factors, output)
        return output

    def _multiply(self, left: Tensor, right: Tensor, output: Tensor) -> None:
        """Record a matrix product. If its left factor comes from the last softmax, it is the second product of an
        attention, and the attention is recorded."""
        if self._softmax is not None and right.dim() >= 3:
            scores, probabilities, before = self._softmax
            if comes_from(left, probabilities):
                first = first_product(self._products[:before], scores)
                if first is not None:
                    self._attend(*first, right)
                self._softmax = None
                self._products.clear()
                return
        self._products.append((left, right, output))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        operands = {"q": query, "k": key, "v": value}
        self.recording.attentions.append(AttentionEvent(tuple(self._frames), operands, dict(self._outputs)))


def product_factors(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Returns the two factors of a matrix product, for all functions that compute one."""
    if func in _PRODUCTS:
        factors = [*args, *kwargs.values()][:2]
    elif func in (torch.baddbmm, Tensor.baddbmm):
        factors = [kwargs.get("batch1", args[1] if len(args) > 1 else None), kwargs.get("batch2", args[-1])]
    elif func is torch.einsum:
        factors = list(args[1] if isinstance(args[1], list | tuple) else args[1:])
    else:
        return None
    return tuple(factors) if len(factors) == 2 and all(isinstance(f, Tensor) for f in factors) else None


def first_product(products: list[tuple[Tensor, Tensor, Tensor]], scores: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns the query and the key of a softmax with the input `scores`. They are the factors of the last product that
    has the shape of `scores`. If no product has this shape (gpt_oss adds a column to the scores), they are the factors
    of the product from which `scores` was computed."""
    latest = products[::-1]
    alike = ((query, key) for query, key, output in latest if output.shape[-2:] == scores.shape[-2:])
    source = ((query, key) for query, key, output in latest if comes_from(scores, output))
    return next(alike, None) or next(source, None)


def comes_from(value: Tensor, source: Tensor) -> bool:
    """Whether `value` is `source` after a few steps of masking, casting, slicing or reshaping."""
    if value is source:
        return True
    if source.grad_fn is None:
        return False
    waiting, seen = [value.grad_fn], 0
    while waiting and seen < _SHALLOW:
        node = waiting.pop()
        seen += 1
        if node is source.grad_fn:
            return True
        if node is not None:
            waiting.extend(parent for parent, _ in node.next_functions)
    return False
