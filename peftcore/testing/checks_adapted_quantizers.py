"""Checks of quantized layers with installed operators of every kind: training, merging, removing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from peftcore.errors import MergeError
from peftcore.registry.plugins import layer_of
from peftcore.testing.quantizers import LINEAR, QuantizerCase, check
from peftcore.testing.tools import KINDS

ATTRIBUTES = "attributes of"


@check(
    "an evaluation between takes no gradient away",
    cause="evaluation packs the weight again, for a kernel without backward",
    remedy="leave what is packed as it is, and choose the kernel in each forward anew",
)
def evaluation_does_not_disturb_training(case: QuantizerCase) -> None:
    for kind in ("activation", "weight"):
        model = case.packed()
        expected = case.train(model, case.adapt(model, kind))
        for before in (False, True):  # before the operators come, or after
            other = case.packed()
            if before:
                case.run(other)
            injection = case.adapt(other, kind)
            case.run(other)
            with torch.inference_mode():
                other.eval()(case.values(2, 64))
            for name, gradient in case.train(other, injection).items():
                case.expect(bool(gradient.abs().max() > 0), f"{name} of {kind!r} has no gradient but zeros")
                case.expect_close(gradient, expected[name], f"gradient of {name} of {kind!r}")


@check(
    "operators of every kind train as on the dense weights that are read",
    cause="`runs_dense`, the bias, or the backward is not that of the weight that is read",
    remedy="add the bias that stands at the module, once, and let autograd see it",
)
def every_kind_of_operator_trains(case: QuantizerCase) -> None:
    for kind in KINDS:
        model = case.packed()
        twin = case.twin(model)
        injection, other = case.adapt(model, kind), case.adapt(twin, kind)
        gradients, expected = case.train(model, injection), case.train(twin, other)
        for name, gradient in expected.items():
            case.expect(bool(gradient.abs().max() > 0), f"{name} of {kind!r} does not matter here")
            case.expect_near(gradients[name], gradient, f"gradient of {name} of {kind!r}")
        case.expect_near(case.run(model), case.run(twin), f"output with {kind!r}")


@check(
    "a merge into floating point keeps the output, and its undoing the codes",
    cause="`dtype` is not what was packed from",
    remedy="remember the weight's dtype in the module",
)
def merging_into_float_keeps_the_output_and_the_codes(case: QuantizerCase) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            model = case.packed(dtype)
            injection = case.adapt(model, kind)
            adapted, before = case.run(model, dtype), case.state(model)
            report = injection.merge(into="float")
            dense = LINEAR if kind != "bias" else ()
            case.expect(report.dense == dense, f"{report.dense} are told to be dense after {kind!r}")
            for path in dense:
                case.expect(not layer_of(model.get_submodule(path), "weight").packed, f"{path} is still packed")
            case.expect_near(case.run(model, dtype), adapted, f"output when {kind!r} is merged in {dtype}")
            injection.unmerge()
            case.expect_unchanged(before, model, f"{kind!r} merged and unmerged", ATTRIBUTES)
            case.expect_equal(case.run(model, dtype), adapted, f"output when {kind!r} is unmerged")


@check(
    "a merge into the same format tells its error, or refuses",
    cause="`pack` does not take over the module's options",
    remedy="make the new module with all options of the one that comes in",
)
def merging_into_the_same_format_tells_its_error(case: QuantizerCase) -> None:
    for kind in KINDS:
        model, other = case.packed(), case.packed()
        injection = case.adapt(model, kind)
        adapted, before = case.run(model), case.state(model)
        case.adapt(other, kind).merge(into="float")
        try:
            report = injection.merge(into="same")
        except MergeError:
            case.expect_unchanged(before, model, f"a merge of {kind!r} that was refused", ATTRIBUTES)
            continue
        case.expect(tuple(report.repacked) == (LINEAR if kind != "bias" else ()), f"{report} of {kind!r}")
        for path, told in report.repacked.items():
            meant, module = case.read(other.get_submodule(path)).float(), model.get_submodule(path)
            case.expect(layer_of(module, "weight").packed, f"{path} is dense")
            error, own = float((case.read(module).float() - meant).norm() / meant.norm()), case.error(meant)
            case.expect(abs(error - told.error) < 1e-3 * error + 1e-6, f"error {error:.3g}, told {told.error:.3g}")
            case.expect(error < 1.2 * own + 1e-6, f"error {error:.3g}, by the scheme itself {own:.3g}")
        case.expect_near(case.run(model), case.run(case.twin(model)), f"output when {kind!r} is packed again")
        injection.unmerge()
        case.expect_unchanged(before, model, f"{kind!r} packed again and unmerged", ATTRIBUTES)
        case.expect_equal(case.run(model), adapted, f"output when {kind!r} is unmerged")


@check(
    "a merge above its bound refuses, and nothing changes",
    cause="`pack` changes the module that it is to be packed like",
    remedy="only read from it, and return a new one",
)
def a_bound_refuses_and_changes_nothing(case: QuantizerCase) -> None:
    model = case.packed()
    injection = case.adapt(model, "activation")
    adapted, before = case.run(model), case.state(model)
    try:
        report = injection.merge(into="same", max_error=0.0)
    except MergeError:
        case.expect_unchanged(before, model, "a merge that was refused")
        case.expect_equal(case.run(model), adapted, "output after a merge that was refused")
        return
    worst = max((each.error for each in report.repacked.values()), default=1.0)
    case.expect(worst == 0, f"merged with an error of {worst:.3g}")


def _as_large(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() >= 64 * 128


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that records which dense (not quantized) tensors as large as weights are computed within its
    block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: list[tuple[torch.Size, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if type(each) in (Tensor, nn.Parameter) and _as_large(each):
                self.held.append((each.shape, StorageWeakRef(each.untyped_storage())))  # type: ignore[no-untyped-call]
        return result

    def alive(self) -> list[torch.Size]:
        return [shape for shape, storage in self.held if not storage.expired()]


@check(
    "no dense copy is kept after an evaluation or for backward",
    cause="a weight that was unpacked is kept at the module, or by autograd",
    remedy="unpack again in backward: keep in `ctx` what is packed",
)
def no_dense_copy_is_kept(case: QuantizerCase) -> None:
    for kind in ("activation", "weight"):
        model = case.packed()
        case.adapt(model, kind)
        with _Made() as made:
            case.run(model)
        case.expect(not made.alive(), f"after an evaluation with {kind!r}: {made.alive()[:2]}")
        with _Made() as made:
            output = model.train()(case.values(3, 5, 64))
        case.expect(not made.alive(), f"for backward with {kind!r}: {made.alive()[:2]}")
        output.sum().backward()


@check(
    "removing leaves codes, class and attributes as they were",
    cause="reading sets attributes",
    remedy="let `unpack`, `features`, `dtype` and `device` only read",
)
def removing_leaves_no_trace(case: QuantizerCase) -> None:
    for kind in KINDS:
        model = case.packed()
        with torch.no_grad():  # some set attributes in their first forward
            output = model.train()(case.values(3, 5, 64))
        model.eval()
        before = case.state(model)
        injection = case.adapt(model, kind)
        case.train(model, injection)
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.sub_(0.1 * torch.ones_like(parameter))
        case.run(model)
        injection.remove()
        case.expect_unchanged(before, model, f"{kind!r} came and went")
        with torch.no_grad():
            case.expect_equal(model.train()(case.values(3, 5, 64)), output, "output")
