"""Checks of forwards of the adapted host: inputs, dtypes, copies, threads, compilers."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MethodType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import peftcore
from peftcore.layers import kinds
from peftcore.testing.checks_training import backward, expect_same_gradients, loss
from peftcore.testing.compiling import AsItStands
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import FILL, Build, Case, NotApplicable, check, fill
from peftcore.testing.probes import (
    ByKeyword,
    FailingAt,
    Holder,
    Interrupted,
    counted_hooks,
    through_file,
    together,
)
from peftcore.testing.tools import differences, raises, shapes_only, trace

ON_TORCH = ("mlp", "encoder", "convnet")
"""Hosts built only from modules of torch. If a check fails on them, the cause is the method and not another library."""


def _flipped(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.flip(0) for key, value in inputs.items()}


@check(
    "on a bfloat16 host with float32 operators, outputs are bfloat16 and right",
    cause="factors are not cast to the dtype of what they meet, so the sum becomes float32",
    remedy="`A, B = self.cast(y, self.A, self.B)` before they are used",
)
def low_precision_hosts_keep_their_dtype(case: Case) -> None:
    exact, inputs = case.fresh()
    case.filled(exact)
    expected = case.quiet(exact, inputs)
    model, inputs = case.fresh(torch.bfloat16)
    injection = case.filled(model)
    output, gradients = backward(case, model, inputs, injection)
    case.expect(output.dtype == torch.bfloat16, f"the output is {output.dtype}")
    case.expect_close(output.float(), expected.bfloat16(), "output in bfloat16", factor=3)
    case.expect(all(bool(torch.isfinite(g).all()) for g in gradients.values()), "gradients are not finite")


@check(
    "under autocast, the output has the dtype that the base has there, and float32 operators get float32 gradients",
    cause="the update is made in the input's dtype, or with autocast turned off",
    remedy="cast to the dtype of what the layer returned, `self.cast(y, ...)` with `y = call(x)`, and leave autocast "
    "on",
)
def autocast_decides_the_dtype(case: Case) -> None:
    model, inputs = case.fresh()
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        module.register_forward_hook(_noting(seen, path))
    with torch.autocast("cpu", torch.bfloat16):
        case.run(model, inputs)
        base = dict(seen)
        injection = case.filled(model)
        output = case.run(model, inputs)
    wrong = [path for path, dtype in base.items() if seen[path] != dtype]
    case.expect(not wrong, f"another dtype than the base's comes out of: {', '.join(wrong[:3])}")
    loss(output).backward()  # type: ignore[no-untyped-call]
    got = {p.grad.dtype for p in injection.parameters() if p.grad is not None}
    case.expect(got == {torch.float32}, f"gradients are {got}")


def _noting(seen: dict[str, Any], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen[path] = output.dtype if isinstance(output, Tensor) else None

    return hook


@functools.cache
def _stays_behind(build: Build) -> str:
    """Return the error of a host that cannot run on the meta device even without adapters; empty if it can."""
    model, inputs = build()
    there = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in inputs.items()}
    try:
        with shapes_only(), torch.no_grad():
            model.to("meta").eval()(**there)
    except RuntimeError as error:
        return str(error)
    return ""


@check(
    "moved to another device, the host works there, and no value is asked for, which would be waited for",
    cause="a tensor is made without a device (`torch.arange(n)`), or is neither parameter nor buffer; or `.item()`, "
    "`if` or a mask looks at values",
    remedy="say `device=x.device` where tensors are made, `register_buffer` for what is fixed, `torch.where` for what "
    "values decide",
)
def it_works_where_its_host_is(case: Case) -> None:
    """Run the adapted host on the meta device. Code that reads values of tensors, or uses tensors on another device,
    raises an error there."""
    if reason := _stays_behind(case.host.build):
        raise NotApplicable(f"the host by itself cannot: {reason}")
    model, inputs = case.fresh()
    there = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in inputs.items()}
    injection = case.filled(model)
    model.to("meta")
    with shapes_only():
        output, gradients = backward(case, model.train(), there, injection)
        held = {"the output": output, **gradients, "the output in evaluation": case.quiet(model, there)}
    wrong = [name for name, tensor in held.items() if tensor.device.type != "meta"]
    case.expect(not wrong, f"still on the device where it was: {', '.join(wrong[:3])}")


WAYS: Mapping[str, Callable[[Tensor], object]] = {
    "in place": lambda tensor: tensor.detach().add_(FILL),
    "in place through .data": lambda tensor: tensor.data.add_(FILL),
    "through a numpy view": lambda tensor: np.add(array := tensor.detach().numpy(), array.dtype.type(FILL), out=array),
    "by another tensor in .data": lambda tensor: setattr(tensor, "data", tensor.data * 1.5),
}
"""Ways to write to a weight. Only the first way increases torch's version counter of the weight."""


@check(
    "changed parameters and weights show at once in evaluation, whoever writes to them and how",
    cause="a value computed from them is kept, as long as their versions or addresses are the same",
    remedy="keep nothing: `prepare` is called once where a user says that nothing is written",
)
def changes_show_at_once(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    case.quiet(model, inputs)
    held = [site.module._parameters.get(site.tensor) for site in injection.sites]
    base = {id(tensor): tensor for tensor in held if tensor is not None}
    for what, tensors in {"parameters": list(injection.parameters()), "weights of the model": [*base.values()]}.items():
        for way, write in WAYS.items():
            for tensor in tensors:
                write(tensor)
            fresh, _ = case.fresh()
            case.apply(fresh)
            fresh.load_state_dict(model.state_dict())
            case.expect_equal(
                case.quiet(model, inputs), case.quiet(fresh, inputs), f"output after {what} changed {way}"
            )


@check(
    "rows of a batch do not influence each other",
    cause="an operator mixes rows: a mean or a norm over the batch",
    remedy="reduce over the last dimension, never over the first",
)
def rows_stay_apart(case: Case) -> None:
    model, inputs = case.fresh()
    case.filled(model)
    together = case.quiet(model, inputs)
    for row in range(len(together)):
        alone = case.quiet(model, {key: value[row : row + 1] for key, value in inputs.items()})
        case.expect_close(alone, together[row : row + 1], f"row {row} alone", factor=10)


@check(
    "a sequence with padding on the left gives what it gives alone",
    cause="an operator counts places, padding too, or what it puts in front of the tokens stands before the padding",
    remedy="count by the mask or the positions of the call; a `SequenceOperator` puts rows behind the padding",
    hosts=("llama", "gpt2", "t5", "moe", "mistral"),
)
def padding_on_the_left_does_not_matter(case: Case) -> None:
    model, inputs = case.fresh()
    case.filled(model)
    padded = {name: value.flip(1) if name != "decoder_input_ids" else value for name, value in inputs.items()}
    answers, mask = "decoder_input_ids" in inputs, padded["attention_mask"]
    if not answers:
        padded["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    together = case.quiet(model, padded)
    for row, tokens in enumerate(mask.sum(1).tolist()):
        own = {name: value[row : row + 1, -tokens:] for name, value in padded.items() if value.shape == mask.shape}
        if answers:
            own["decoder_input_ids"] = inputs["decoder_input_ids"][row : row + 1]
        alone = case.quiet(model, own)
        case.expect_close(together[row : row + 1, -alone.shape[1] :], alone, f"row {row} without padding", factor=10)


@check(
    "inputs of two to five dimensions give what the flattened ones give",
    cause="forward names the dimensions of its input (`bsi`), or reads a length from one of them",
    remedy="write formulas over the last dimension: `...i`, `x @ A.T`, `self.layer.apply`",
    hosts=("mlp",),
)
def leading_dimensions_do_not_matter(case: Case) -> None:
    model, inputs = case.fresh()
    case.filled(model)
    x = inputs["x"]
    flat = case.quiet(model, {"x": x.flatten(0, -2)})
    for lead in ((2, 3), (1, 3, 2), (1, 2, 1, 3)):
        output = case.quiet(model, {"x": x.reshape(*lead, -1)})
        case.expect(output.shape[:-1] == lead, f"inputs of shape {lead} give outputs of {tuple(output.shape)}")
        case.expect_close(output.reshape(flat.shape), flat, f"output for {len(lead) + 1}-D inputs")


@check(
    "a module that is called with its input by keyword is adapted like any other",
    cause="forward of the operator looks into `kwargs` by names of its own",
    remedy="take the input as the first argument behind `call`: it comes there, however the module was called",
    hosts=("mlp",),
)
def inputs_by_keyword_are_seen(case: Case) -> None:
    torch.manual_seed(0)
    outputs = []
    layer, example = nn.Linear(6, 4), torch.randn(2, 6)
    for kind in (Holder, ByKeyword):
        host = kind(copy.deepcopy(layer), example).eval()  # a method may draw in training
        case.filled(host, target="layer", **case.batches(lambda model: model(), {"x": example}))
        outputs.append(host().detach())
    case.expect_close(outputs[1], outputs[0], "output for an input by keyword")


@check(
    "deepcopy and pickle give hosts that behave the same, with operators of their own",
    cause="state is looked up by the identity of the operator, or kept outside it, or lost in `__getstate__`",
    remedy="keep it in parameters, buffers and plain attributes of the operator",
)
def copies_behave_the_same(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    output = case.quiet(model, inputs)
    ways: dict[str, Callable[[], nn.Module]] = {
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "torch.save": lambda: through_file(model),
    }
    for way, make in ways.items():
        twin = make()
        case.expect_equal(case.quiet(twin, inputs), output, f"output after {way}")
        mine = peftcore.injections(twin)[injection.name]
        with mine.disabled():
            case.expect_equal(case.quiet(twin, inputs), base, f"output of the base after {way}")
        fill(mine, seed=2)
        case.expect_equal(case.quiet(model, inputs), output, f"the first host's output after its {way} changed")


@check(
    "two threads, with and without the adapter or with different inputs, do not meet",
    cause="something is stored on the operator in forward and read later",
    remedy="keep it in local variables; from operator to operator of one forward it goes by a `Tap`",
    hosts=ON_TORCH,
)
def threads_do_not_meet(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    output, other = case.quiet(model, inputs), case.quiet(model, _flipped(inputs))
    case.expect_moved(output, base, "the output")

    def without() -> Tensor:
        with peftcore.activate(model):
            return case.run(model, inputs)

    results = together(lambda: case.run(model, inputs), without)
    case.expect_close(results[0], output, "the thread with the adapter")
    case.expect_close(results[1], base, "the thread without it")
    results = together(lambda: case.run(model, inputs), lambda: case.run(model, _flipped(inputs)))
    case.expect_close(results[0], output, "the first thread")
    case.expect_close(results[1], other, "the thread with other inputs")
    case.expect(injection.active, "the adapter is not active any more")


@check(
    "when forward raises or is interrupted (Ctrl-C), wherever it does, nothing stays behind",
    cause="forward marks something on the operator, and clears it only when all goes well",
    remedy="use local variables; where a mark must be, clear it in `finally`",
    hosts=ON_TORCH,
)
def an_exception_in_forward_leaves_nothing(case: Case) -> None:
    model, inputs = case.fresh()
    case.filled(model)
    output, before = case.quiet(model, inputs), trace(model)
    with torch.no_grad(), FailingAt(-1) as counting:
        case.run(model, inputs)
    for at in range(0, counting.count, max(1, counting.count // 60)):
        with raises(case, Interrupted, "forward"), torch.no_grad(), FailingAt(at):
            case.run(model, inputs)
        case.expect_equal(case.quiet(model, inputs), output, f"output after an exception in call {at}")
    for at in range(0, counting.count, max(1, counting.count // 6)):
        with suppress(KeyboardInterrupt), torch.no_grad(), FailingAt(at, KeyboardInterrupt):
            case.run(model, inputs)
        case.expect_equal(case.quiet(model, inputs), output, f"output after a Ctrl-C in call {at}")
    case.expect(not (wrong := differences(before, trace(model))), f"other than before: {wrong}")


@check(
    "no plugin hook runs while the host runs forward or backward",
    cause="forward looks something up that `inject` knows already",
    remedy="look it up in `__init__`, and keep the result",
)
def no_hook_runs_in_forward(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    with counted_hooks() as names:
        backward(case, model.train(), inputs, injection)
        case.quiet(model, inputs)
    case.expect(not names, f"hooks that ran: {', '.join(sorted(set(names)))}")


@check(
    "torch.compile without graph breaks gives the same outputs and gradients",
    cause="Python that depends on values of tensors: `.item()`, `if tensor:`; or a call that cannot be traced",
    remedy="write it in torch operations (`torch.where`); with TORCH_LOGS=graph_breaks torch names the line; where "
    "that cannot be, the tag `whole_graph=False` says so",
    hosts=tuple(HOSTS),  # so that a quick run, in which nothing takes longer, takes one of them
    cost="slow",
)
def compiled_equals_eager(case: Case) -> None:
    model, inputs = case.shallow()
    injection = case.filled(model)
    case.quiet(model, inputs)  # silent layers are checked in the first forward
    output, expected = backward(case, model, inputs, injection)
    torch.compiler.reset()
    model.compile(backend=(backend := AsItStands()), fullgraph=case.tags.whole_graph)
    compiled, gradients = backward(case, model, inputs, injection)
    case.expect_close(compiled, output, "the compiled host's output", factor=10)
    expect_same_gradients(case, gradients, expected, "compiled")
    case.expect_close(case.quiet(model, inputs), output, "the compiled host's output without gradients", factor=10)
    case.expect(
        case.tags.whole_graph or len(backend.graphs) > 2, "whole_graph=False, but one graph is made of the whole model"
    )
    case.expect(
        not backend.lost,
        "inductor drops the alpha or beta of sums and products that it makes one; multiply what has few columns "
        f"instead: {'; '.join(backend.lost)}",
    )


@check(
    "torch.export gives a program with the same outputs",
    cause="forward goes another way while it is traced, or depends on values of tensors",
    remedy="ask for neither `is_exporting` nor `is_compiling`, and write it in torch operations",
    hosts=("mlp",),
)
def exported_equals_eager(case: Case) -> None:
    model, inputs = case.fresh()
    case.filled(model)
    output = case.quiet(model, inputs)
    program = torch.export.export(model, (), dict(inputs)).module()
    with torch.no_grad():
        case.expect_close(case.host.output(program(**inputs)), output, "the exported program's output", factor=10)


@check(
    "the fused kernel gives what the plain forward says, with gradients",
    cause="a forward with `@low_rank` computes something else than `factors()` says: another scale, a gate, a norm",
    remedy="write `call(x) + scale * B A dropout(x)` of the factors there, or take `@low_rank` away",
    when=lambda tags: tags.low_rank,
)
def fused_kernels_equal_the_plain_forward(case: Case) -> None:
    model, inputs = case.fresh(torch.float64)
    injection = case.filled(model)
    plain = {each: vars(type(each).forward).get("plain") for each in injection.operators.values()}
    if not any(plain.values()):
        raise NotApplicable("no operator has a forward with @low_rank")
    with mock.patch.object(kinds, "SMALL", 0):  # tiny hosts run the kernel for large inputs too
        output, gradients = backward(case, model, inputs, injection)
    for operator, forward in plain.items():
        if forward is not None:
            vars(operator)["forward"] = MethodType(forward, operator)
    expected, wanted = backward(case, model, inputs, injection)
    case.expect_close(output, expected, "output of the fused kernel")
    expect_same_gradients(case, gradients, wanted, "the fused kernel")
