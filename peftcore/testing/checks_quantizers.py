"""Checks of a quantizer alone, without adapters."""

from __future__ import annotations

import copy
import importlib.util
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import peftcore
from peftcore.errors import QuantizationError
from peftcore.injection.quantization import quantize, scheme, scheme_class
from peftcore.layers.kinds import Transposed
from peftcore.registry.plugins import layer_of
from peftcore.testing.failures import CheckFailed
from peftcore.testing.hosts import gpt2
from peftcore.testing.kit import NotApplicable, fill
from peftcore.testing.quantizers import LINEAR, QuantizerCase, check
from peftcore.testing.tools import Kinds, differences, raises, trace

USELESS = 0.3
"""A scheme fails if its relative error of quantizing and reading a weight is larger than this. Formats with 3 bits have
a smaller error."""


@check(
    "what is packed is read back, always the same, near the weight",
    cause="`module` and `unpack` do not fit together, or packing draws random numbers",
    remedy="compare `layer.unpack(scheme.module(w))` with w, row by row",
)
def what_is_packed_is_read_back(case: QuantizerCase) -> str:
    chosen, weight = case.scheme, case.values(128, 64)
    weight[5] = 0
    once, again = chosen.module(weight), chosen.module(weight.clone())
    read = chosen.layer.unpack(once)
    case.expect(read.shape == weight.shape, f"{tuple(weight.shape)} is read as {tuple(read.shape)}")
    case.expect_equal(chosen.layer.unpack(again), read, "packed twice")
    case.expect_equal(chosen.layer.unpack(once), read, "read twice")
    case.expect(bool(read.isfinite().all()), "what is read is not finite")
    case.expect(read.dtype == (chosen.layer.dtype(once) or torch.float32), f"`dtype` is not that of {read.dtype}")
    case.expect(layer_of(once, "weight") == chosen.layer, "`peftcore_layer` does not answer with the scheme's layer")
    error = case.error(weight)
    case.expect(error < USELESS, f"the error is {error:.3g}")
    case.expect(case.error(read) < 1.1 * error + 1e-6, "what was read is packed worse than the weight")
    return f"error {error:.3g}"


@check(
    "forward is x W^T + b with the weight that is read",
    cause="scales or the bias are used in another way in forward, or one dtype takes a path of its own",
    remedy="compare it with `linear(x, unpack(module), bias)`, in float32 and in bfloat16",
)
def forward_uses_the_weight_that_is_read(case: QuantizerCase) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = case.packed(dtype)
        for path, width in zip(LINEAR, (64, 128), strict=True):
            module, x = model.get_submodule(path), case.values(7, width, dtype=dtype)
            bias = None if module.bias is None else module.bias.double()
            expected = nn.functional.linear(x.double(), case.read(module).double(), bias)
            actual = module(x)
            case.expect(actual.dtype == dtype, f"{path} makes {actual.dtype} of {dtype}")
            case.expect_near(actual, expected.to(dtype), f"{path} in {dtype}")


@check(
    "gradients pass to the input as through the dense weight",
    cause="the kernel has no backward, or another weight in it",
    remedy="wrap it into a `torch.autograd.Function` whose backward is the gradient times the weight that is read",
)
def gradients_pass_to_the_input(case: QuantizerCase) -> None:
    for shape in ((7, 64), (3, 5, 64)):
        module, x, weights = case.packed().first, case.values(*shape).requires_grad_(), case.values(*shape[:-1], 128)
        module.train()(x).backward(weights)
        if x.grad is None:
            raise CheckFailed("no gradient")
        case.expect_near(x.grad, weights @ case.read(module).float(), f"input {shape}")


@contextmanager
def never_unpacking(case: QuantizerCase) -> Iterator[None]:
    """Context manager that fails the check if a layer's weight is dequantized as a whole within the block."""
    kind = type(case.scheme.layer)
    with mock.patch.object(kind, "unpack", autospec=True, side_effect=kind.unpack) as unpack:
        yield
        case.expect(not unpack.call_count, f"unpacked {unpack.call_count} times")


@check(
    "shapes and counts are those of the dense layers, told without unpacking",
    cause="`features` or `dtype` read the weight",
    remedy="keep both as attributes of the module",
)
def shapes_are_told_without_unpacking(case: QuantizerCase) -> None:
    dense, packed = case.dense(), case.packed()
    with never_unpacking(case):
        facts = []
        for model in (dense, packed):
            plan = peftcore.plan(model, Kinds, kind="activation", target=list(LINEAR))
            injection = peftcore.apply(model, Kinds, kind="activation", target=list(LINEAR))
            sites = [(s.weight_shape, s.in_features, s.out_features, s.numel, s.device) for s in injection.sites]
            summary = injection.summary()
            facts.append([*sites, plan.trainable, plan.total, plan.bytes, summary.parameters, summary.trainable])
    case.expect(facts[0] == facts[1], f"{facts[0]} became {facts[1]}")


@check(
    "quantize keeps modules, hooks, biases, modes, all other modules and torch's random state",
    cause="the module goes round torch's `__call__`, or has a bias or hooks of its own, or initializes a weight that "
    "is then replaced",
    remedy="define `forward` alone, and register a bias of None: the layer's own is put there; build a module of "
    'another library with device="meta"',
)
def quantize_keeps_what_stands_there(case: QuantizerCase) -> None:
    model, seen = case.dense(), list[Any]()
    first, bias, before = model.first, model.first.bias, trace(model.norm)
    model.second.train()
    first.register_forward_hook(lambda module, inputs, output: seen.append(module))
    first.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    drawn = torch.random.get_rng_state()
    quantize(model, case.name, **case.options)
    case.expect(torch.equal(torch.random.get_rng_state(), drawn), "torch's random state changed")
    case.expect(model.first is first and first.bias is bias, "the module or its bias is another one")
    case.expect(all(layer_of(model.get_submodule(path), "weight").packed for path in LINEAR), "not all are packed")
    case.expect((model.training, first.training, model.second.training) == (False, False, True), "modes changed")
    wrong = differences(before, trace(model.norm))
    case.expect(not wrong, f"another module changed: {wrong}")
    model(case.values(2, 64))
    case.expect(seen == [first, first], f"{len(seen)} of two hooks ran")


@check(
    "fused and transposed layers of transformers are packed right",
    cause="the order of rows depends on the shape, or the weight's strides are not looked at",
    remedy="treat row i as row i, whatever the shape",
)
def fused_and_transposed_layers_are_packed(case: QuantizerCase) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model, inputs = gpt2(64)()
    before = {
        path: layer_of(module, "weight").logical(module.weight.detach()).contiguous()
        for path, module in model.named_modules()
        if type(layer_of(module, "weight")) is Transposed  # transformers' Conv1D
    }
    quantize(model.eval(), case.name, **case.options)
    for path, weight in before.items():
        module: Any = model.get_submodule(path)
        x = case.values(3, weight.shape[1])
        read = case.read(module)
        case.expect_close(read, case.scheme.layer.unpack(case.scheme.module(weight)).float(), f"weight of {path}")
        case.expect_near(module(x), nn.functional.linear(x, read.float(), module.bias), path)
    injection = peftcore.apply(model, Kinds, kind="activation", target=["attn.q", "attn.v", "mlp.up"])
    fill(injection)
    adapted = model(**inputs).logits
    injection.merge()
    case.expect_near(model(**inputs).logits, adapted, "output when parts of fused layers are merged")


@check(
    "a copy computes the same, and holds codes of its own",
    cause="something in the module cannot be copied",
    remedy="hold tensors in buffers, and define no `__deepcopy__`",
)
def copies_compute_the_same(case: QuantizerCase) -> None:
    model = case.packed()
    case.adapt(model, "activation")
    other, expected = copy.deepcopy(model), case.run(model)
    case.expect_equal(case.run(other), expected, "output of the copy")
    shared = {id(t) for t in (*model.buffers(), *model.parameters())} & {
        id(t) for t in (*other.buffers(), *other.parameters())
    }
    case.expect(not shared and other.first is not model.first, "the copy shares tensors or modules")


@check(
    "a module that was pickled computes the same",
    cause="something in the module is known to this process alone: a function, a handle",
    remedy="make it in forward, or leave it out in `__getstate__`",
)
def pickles_compute_the_same(case: QuantizerCase) -> None:
    model, file = case.packed(), io.BytesIO()
    expected = case.run(model)
    torch.save(model, file)
    file.seek(0)
    case.expect_equal(case.run(torch.load(file, weights_only=False)), expected, "output of what was read")


@check(
    "a state_dict goes through safetensors into a host packed anew",
    cause="a tensor is no buffer, or is not persistent",
    remedy="register all that `unpack` reads by `register_buffer`",
)
def state_is_saved_and_loaded(case: QuantizerCase) -> None:
    from safetensors.torch import load_file, save_file

    model, other = case.packed(), case.dense()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-2)
    quantize(other, case.name, **case.options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
        other.load_state_dict(load_file(file))
    case.expect_equal(case.run(other), case.run(model), "output of the host that was loaded into")


@check(
    "a wrong option is one error that says which there are",
    cause="the scheme's fields are not strict, or unknown ones are passed over",
    remedy="leave `model_config` alone, and give each option its type",
)
def wrong_options_are_refused(case: QuantizerCase) -> None:
    fields = scheme_class(case.name).model_fields
    for wrong in ("no_such_option", *fields):
        model = case.dense()
        before = trace(model)
        with raises(case, QuantizationError, f"{wrong} is an object", names=[case.name, wrong, *fields]):
            quantize(model, case.name, **{**case.options, wrong: object()})
        case.expect(not differences(before, trace(model)), "the host changed")


@check(
    "a missing package is one error that says what to install",
    cause="`extra` does not say it",
    remedy="set it to what pip is to install: name[extra]",
)
def missing_packages_are_told(case: QuantizerCase) -> None:
    kind = scheme_class(case.name)
    if not kind.requires:
        raise NotApplicable(f"{case.name} needs no package")
    case.expect(bool(kind.extra), "`extra` is empty")
    find = importlib.util.find_spec
    for package in kind.requires:
        without = mock.patch.object(
            importlib.util, "find_spec", lambda name, *rest, gone=package: None if name == gone else find(name, *rest)
        )
        names = [case.name, package, f"pip install '{kind.extra}'"]
        with without, raises(case, QuantizationError, f"without {package}", names=names):
            scheme(case.name, **case.options)


@check(
    "a weight of any shape is packed right, or refused with nothing changed",
    cause="a shape is not looked at in `module`, or is refused with another error",
    remedy="raise QuantizationError in `module` for what the format cannot hold",
)
def what_does_not_fit_is_refused(case: QuantizerCase) -> None:
    chosen = case.scheme
    for shape in ((7, 5), (3, 1), (1, 64), (33, 17), (64, 33), (33, 64)):
        model: Any = nn.Sequential(nn.Linear(128, 64), nn.Linear(shape[1], shape[0])).eval()
        weight, before = model[1].weight.detach().clone(), trace(model)
        try:
            quantize(model, case.name, **case.options)
        except QuantizationError:
            case.expect(not differences(before, trace(model)), f"{shape} was refused, but the host changed")
            continue
        read, x = case.read(model[1]), case.values(4, shape[1])
        case.expect_close(read.float(), chosen.layer.unpack(chosen.module(weight)).float(), f"weight {shape}")
        case.expect(read.shape == weight.shape, f"{shape} is read as {tuple(read.shape)}")
        case.expect(case.error(weight) < USELESS, f"the error of {shape} is {case.error(weight):.3g}")
        case.expect_near(model[1](x), nn.functional.linear(x, read.float(), model[1].bias), f"output of {shape}")
