"""The check of quantized models: on a quantized base, a method computes the same as on a dense (dequantized) base with
the same weights."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import MergeError, NotMergeable, TargetError
from peftcore.injection.injection import Injection
from peftcore.injection.merging import MergeReport
from peftcore.injection.quantization import dequantize, scheme_class, schemes
from peftcore.injection.quantized_layer import QuantizedLayer
from peftcore.registry.plugins import layer_of
from peftcore.testing.checks_training import backward, expect_same_gradients
from peftcore.testing.kit import ALL, Build, Case, NotApplicable, check
from peftcore.testing.tools import findable

TELLING_SCHEMES = ("nf4", "bnb-nf4")
"""The schemes that are tested in a quick run: one that uses only torch, and one whose kernel has no gradient."""
SMALL_GROUPS = 8
"""The group size for quantizing the hosts. It divides their widths, which are smaller than common group sizes."""
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"group_size": SMALL_GROUPS} for name in ("int4", "torchao-int4", "hqq-8", "hqq-4")
}
PACKS_INPUTS = {"bnb-int8": 1e4}
"""Schemes whose forward also quantizes the inputs, each with a factor for the tolerance of outputs."""
HOSTS = ("llama", "vit", "gpt2", "unet")


@dataclass(frozen=True)
class Life:
    """What a method could do on one quantized model."""

    trains: str
    merges: str
    repacks: str


def installed_schemes() -> list[str]:
    """Return the names of the schemes whose packages are installed."""
    return [name for name in schemes() if not scheme_class(name).missing()]


@check(
    "on a packed base a method computes, trains, merges, saves and loads as on a dense one with the same weights",
    cause="a weight is read past `site.weight()` or `merged`, or what is computed depends on how the base is stored",
    remedy="use `site.weight()` in `__init__`, and `call` or the weight that comes in later; never ask `layer.packed`",
    hosts=HOSTS,
)
def packed_bases_are_like_dense_ones(case: Case) -> None:
    names = installed_schemes()
    if not names:
        raise NotApplicable("no plugin with a scheme is installed")
    for name in names if os.environ.get(ALL) == "1" else [each for each in TELLING_SCHEMES if each in names]:
        life(case, name, case.shallow)


def life(case: Case, scheme: str, build: Build | None = None) -> Life:
    """Evaluate, train, merge, save and load a method on a model that is quantized by `scheme`.

    Args:
        case: the method and the host.
        scheme: the name of the scheme.
        build: builds the model and its inputs; by default the whole host.

    Raises:
        CheckFailed: a result differs from the result on a dense (dequantized) base.
        NotApplicable: the host has no linear layers that can be quantized.
    """
    build = build or case.fresh
    model, inputs = _packed(build, scheme)
    factor = PACKS_INPUTS.get(scheme, 1.0)
    injection = case.filled(model)
    codes = _read(model)
    adapted = case.quiet(model, inputs)
    case.expect_close(adapted, case.quiet(*_dense(model, inputs)), f"{scheme}: output, beside a dense base", factor)
    model.train(False)
    trains = _trains(case, model, inputs, injection, f"{scheme}: ", factor)
    merges, repacks = _merges(case, model, inputs, injection, codes, f"{scheme}: ", factor)
    _reloads(case, scheme, build, injection, adapted)
    injection.remove()
    _expect_codes(case, model, codes, f"{scheme}: after removal")
    return Life(trains, merges, repacks)


def _packed(build: Build, scheme: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = build()
    try:
        exclude = _does_not_fit if scheme in OPTIONS else None
        return peftcore.quantize(model, scheme, exclude=exclude, **OPTIONS.get(scheme, {})), inputs
    except TargetError as error:
        raise NotApplicable(str(error)) from None


def _does_not_fit(path: str, module: nn.Module) -> bool:
    return getattr(module, "in_features", 0) % SMALL_GROUPS > 0


def _dense(model: nn.Module, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a dequantized copy of the adapted host."""
    return dequantize(copy.deepcopy(model)), inputs


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizedLayer]]:
    for path, module in model.named_modules():
        layer = layer_of(module, "weight")
        if isinstance(layer, QuantizedLayer):
            yield path, module, layer


def _read(model: nn.Module) -> dict[str, Tensor]:
    return {path: layer.unpack(module).clone() for path, module, layer in _layers(model)}


def _expect_codes(case: Case, model: nn.Module, codes: dict[str, Tensor], what: str) -> None:
    now = _read(model)
    wrong = [path for path in codes if path not in now or not torch.equal(now[path], codes[path])]
    case.expect(not wrong and now.keys() == codes.keys(), f"{what}: packed weights changed: {wrong[:3]}")


def _trains(
    case: Case, model: nn.Module, inputs: dict[str, Any], injection: Injection, where: str, factor: float
) -> str:
    if not any(parameter.requires_grad for parameter in injection.parameters()):
        return "nothing to train"
    twin, _ = _dense(model, inputs)
    _, expected = backward(case, twin, inputs, peftcore.injections(twin)[injection.name])
    _, gradients = backward(case, model, inputs, injection)
    case.expect(gradients.keys() == expected.keys(), f"{where}other tensors have gradients than on a dense base")
    if factor == 1.0:
        expect_same_gradients(case, gradients, expected, f"{where}beside a dense base")
    else:
        one, other = (torch.cat([each[name].flatten() for name in expected]) for each in (gradients, expected))
        along = float(nn.functional.cosine_similarity(one, other, dim=0))
        case.expect(along > 0.95, f"{where}gradients point elsewhere than on a dense base: cosine {along:.3f}")
    dead = [name for name, gradient in gradients.items() if bool(expected[name].any()) and not bool(gradient.any())]
    case.expect(not dead, f"{where}gradients of zero: {dead[:3]}")
    return "yes"


def _merges(
    case: Case,
    model: nn.Module,
    inputs: dict[str, Any],
    injection: Injection,
    codes: dict[str, Tensor],
    where: str,
    factor: float,
) -> tuple[str, str]:
    adapted = case.quiet(model, inputs)
    try:
        made = injection.merge()
    except NotMergeable:
        case.expect(not case.tags.mergeable, f"{where}cannot be merged, though the method can")
        return "no, as on a dense base", "no, as on a dense base"
    case.expect_close(case.quiet(model, inputs), adapted, f"{where}output when merged into float", factor)
    wanted = {path: model.get_submodule(path).weight.detach().clone() for path in made.dense}  # type: ignore[operator]
    injection.unmerge()
    _expect_codes(case, model, codes, f"{where}after unmerging")
    case.expect_equal(case.quiet(model, inputs), adapted, f"{where}output after unmerging")
    try:
        report = injection.merge(into="same")
    except MergeError as refusal:
        _expect_codes(case, model, codes, f"{where}after a refused merge")
        return "yes", f"refused: {refusal}"
    case.expect(bool(torch.isfinite(case.quiet(model, inputs)).all()), f"{where}not finite when packed again")
    for path, weight in _read(model).items():
        if path in report.repacked:
            error = float((weight.float() - wanted[path].float()).norm() / wanted[path].float().norm())
            stated = report.repacked[path].error
            case.expect(
                abs(error - stated) <= 1e-3 * max(error, 1e-3), f"{where}error {error:.3g}, stated {stated:.3g}"
            )
    injection.unmerge()
    _expect_codes(case, model, codes, f"{where}after unmerging what was packed again")
    return "yes", _worst(report)


def _worst(report: MergeReport) -> str:
    errors = [each.error for each in report.repacked.values()]
    return f"{max(errors):.2g}" if errors else "acts on no packed weight"


def _reloads(case: Case, scheme: str, build: Build, injection: Injection, adapted: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder, findable(case.method):
        injection.save(Path(folder) / "adapter")
        fresh, inputs = _packed(build, scheme)
        peftcore.load(fresh, Path(folder) / "adapter")
    case.expect_close(case.quiet(fresh, inputs), adapted, f"{scheme}: output of the saved adapter")
