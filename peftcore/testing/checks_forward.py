"""Checks of the adapted host at work: forward, backward, training, other dtypes, copies, threads, compilers."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.injection import Injection
from peftcore.plugins import registry
from peftcore.testing.checks_injection import Holder, Interrupted
from peftcore.testing.kit import FILL, Case, NotApplicable, check, fill
from peftcore.testing.tools import differences, raises, trace

STATE = "something is stored on the operator in forward and read later; keep it in local variables"
CASTS = "factors are not cast to the dtype of what they meet: use `self.cast`"
ON_TORCH = ("mlp", "encoder", "convnet")
"""Hosts without code of other libraries: what fails there fails because of the method."""


def _loss(output: Tensor) -> Tensor:
    """Uneven in every entry, so that gradients do not cancel in norms and softmaxes."""
    weights = torch.linspace(-1.0, 1.5, output.numel(), device=output.device).view_as(output)
    return (output.float() * weights).sum() + output.float().square().mean()


def _gradients(injection: Injection) -> dict[str, Tensor]:
    named = ((f"{path}.{name}", p) for path, module in injection.modules() for name, p in module.named_parameters())
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def _backward(
    case: Case, model: nn.Module, inputs: Mapping[str, Any], injection: Injection
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one pass in the model's present mode."""
    model.zero_grad()
    output = case.run(model, inputs)
    _loss(output).backward()  # type: ignore[no-untyped-call]
    return output.detach(), _gradients(injection)


def _expect_same_gradients(case: Case, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    scale = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        case.expect_close(actual[name] / scale, gradient / scale, f"{what}: gradient of {name}", factor=10)


@torch.no_grad()
def _without_dropout(model: nn.Module) -> None:
    """In training mode only what trains should differ from evaluation."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "p"):
                setattr(module, name, 0.0)


def _flipped(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.flip(0) for key, value in inputs.items()}


@check(
    "outputs and gradients are finite, also where the host has rows of zeros (pruned, padded)",
    "a division by the norm of a row; a row of zeros has none",
)
def zero_rows_stay_finite(case: Case) -> None:
    model, inputs = case.fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[..., 0, :] = 0.0
                parameter[0] = 0.0
    injection = case.apply(model)
    output, gradients = _backward(case, model, inputs, injection)
    case.expect(bool(torch.isfinite(output).all()), "the output is not finite")
    wrong = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    case.expect(not wrong, f"gradients that are not finite: {', '.join(wrong[:3])}")


def _trained(case: Case, steps: int = 3) -> tuple[nn.Module, Injection, dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Train a little: model, injection, the base before, the operators before, and the names that got a gradient."""
    model, inputs = case.fresh()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    injection = case.apply(model)
    before = {key: value.clone() for key, value in injection.state_dict().items()}
    optimizer = torch.optim.SGD(list(injection.parameters()), lr=0.05)
    model.train()
    touched: set[str] = set()
    for _ in range(steps):
        _, gradients = _backward(case, model, inputs, injection)
        touched |= {name for name, gradient in gradients.items() if gradient.any()}
        optimizer.step()
    return model, injection, base, before, touched


@check(
    "every trainable tensor gets a gradient and moves within three steps",
    "a parameter that forward does not use, or that is detached; both factors of a product start at zero",
)
def every_trainable_tensor_learns(case: Case) -> None:
    _, injection, _, before, touched = _trained(case)
    named = {f"{path}.{name}": p for path, module in injection.modules() for name, p in module.named_parameters()}
    idle = [
        name for name, p in named.items() if p.requires_grad and (name not in touched or torch.equal(p, before[name]))
    ]
    case.expect(not idle, f"without a gradient: {', '.join(idle[:3])}")


@check(
    "training leaves the base and its statistics as they were, to the bit",
    "an operator writes into the host's tensors; record a replacement instead",
)
def training_leaves_the_base_alone(case: Case) -> None:
    model, _, base, _, _ = _trained(case)
    state = model.state_dict()
    for key, value in base.items():
        case.expect_equal(state[key], value, f"{key} of the base after training")


@check(
    "the effect is the same in training and in evaluation under no_grad, fused paths and padding included",
    "forward asks `self.training` for more than dropout, or a fused path of the host goes around the operator",
)
def the_effect_is_the_same_in_training_and_evaluation(case: Case) -> None:
    model, inputs = case.fresh()
    _without_dropout(model)
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    evaluated = case.quiet(model, inputs)
    case.expect_moved(evaluated, base, "the output")
    model.train()
    case.expect_close(case.run(model, inputs).detach(), evaluated, "output in training", factor=10)
    with injection.disabled():
        case.expect_close(case.run(model, inputs).detach(), base, "the base's output in training", factor=10)


@check(
    "dropout acts in training only",
    "torch's functional dropout is called without `training=self.training`",
)
def dropout_acts_in_training_only(case: Case) -> None:
    if "dropout" not in case.method.Config.model_fields:
        raise NotApplicable("the method has no option called dropout")
    plain, inputs = case.fresh()
    case.filled(plain)
    model, _ = case.fresh()
    _without_dropout(model)
    try:
        case.filled(model, dropout=0.5)
    except peftcore.errors.UnsupportedSite as error:
        raise NotApplicable(str(error)) from None
    case.expect_equal(
        case.run(model, inputs).detach(), case.run(plain, inputs).detach(), "output in evaluation, with dropout=0.5"
    )
    model.train()
    torch.manual_seed(0)
    first, second = case.run(model, inputs).detach(), case.run(model, inputs).detach()
    case.expect_moved(second, first, "a second pass in training")


@check(
    "operators follow train() and eval() of the host",
    "an operator overrides train(), or hides a module in a list or closure",
)
def operators_follow_the_training_mode(case: Case) -> None:
    model, _ = case.fresh()
    injection = case.apply(model)
    for mode in (False, True, False):
        model.train(mode)
        wrong = [
            path for path, operator in injection.modules() if any(m.training is not mode for m in operator.modules())
        ]
        case.expect(not wrong, f"after train({mode}), in the other mode: {', '.join(wrong[:3])}")


@check("on a bfloat16 host with float32 operators, outputs are bfloat16 and right", CASTS)
def low_precision_hosts_keep_their_dtype(case: Case) -> None:
    exact, inputs = case.fresh()
    case.filled(exact)
    expected = case.quiet(exact, inputs)
    model, inputs = case.fresh(torch.bfloat16)
    injection = case.filled(model)
    output, gradients = _backward(case, model, inputs, injection)
    case.expect(output.dtype == torch.bfloat16, f"the output is {output.dtype}")
    case.expect_close(output.float(), expected.bfloat16(), "output in bfloat16", factor=3)
    case.expect(all(bool(torch.isfinite(g).all()) for g in gradients.values()), "gradients are not finite")


@check(
    "under autocast, the output has the dtype that the base has there, and float32 operators get float32 gradients",
    CASTS,
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
    _loss(output).backward()  # type: ignore[no-untyped-call]
    got = {p.grad.dtype for p in injection.parameters() if p.grad is not None}
    case.expect(got == {torch.float32}, f"gradients are {got}")


def _noting(seen: dict[str, Any], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen[path] = output.dtype if isinstance(output, Tensor) else None

    return hook


@check(
    "both kinds of gradient checkpointing give the same gradients",
    "forward does something else when it is computed again in backward",
)
def gradient_checkpointing_changes_nothing(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    output, expected = _backward(case, model, inputs, injection)
    for reentrant in (False, True):
        model.zero_grad()
        trigger = torch.zeros((), requires_grad=True)  # the reentrant kind wants an input that requires a gradient
        again: Tensor = checkpoint(lambda _: case.run(model, inputs), trigger, use_reentrant=reentrant)
        case.expect_close(again.detach(), output, f"output, reentrant={reentrant}")
        _loss(again).backward()  # type: ignore[no-untyped-call]
        _expect_same_gradients(case, _gradients(injection), expected, f"reentrant={reentrant}")


@check(
    "in training, no effective weight is kept for backward",
    "forward computes a weight by itself; say it as a WeightOperator, and the core computes it again in backward",
)
def effective_weights_do_not_outlive_their_use(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    held = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    weights = [graft.site.layer.read(graft.site.module, graft.site.tensor) for graft in injection.grafts]
    shapes = {tuple(sorted(weight.shape)) for weight in weights if weight is not None and weight.dim() > 1}
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tuple(sorted(tensor.shape)) in shapes and tensor.untyped_storage().data_ptr() not in held:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.run(model, inputs)
    case.expect(
        not kept, f"{len(kept)} tensors as large as weights are kept, the first of shape {kept[0] if kept else ()}"
    )


@check(
    "changed parameters show at once in evaluation",
    "a cache without regard to versions and identities of what it was made from",
)
def changes_show_at_once(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    case.quiet(model, inputs)
    for index, way in enumerate(("in place", "through .data")):
        for parameter in injection.parameters():
            if index:
                parameter.data = parameter.data * 1.5
            else:
                parameter.detach().add_(FILL)
        fresh, _ = case.fresh()
        again = case.apply(fresh)
        for mine, other in zip(again.parameters(), injection.parameters(), strict=True):
            mine.data.copy_(other.data)
        case.expect_equal(case.quiet(model, inputs), case.quiet(fresh, inputs), f"output after a change {way}")


@check(
    "after torch.inference_mode, training goes on as if nothing had been",
    "a cache keeps tensors made in inference mode; they cannot be used in training",
)
def inference_mode_leaves_nothing_behind(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    output, expected = _backward(case, model, inputs, injection)
    with torch.inference_mode():
        case.expect_close(case.run(model, inputs), output, "output in inference mode")
    again, gradients = _backward(case, model, inputs, injection)
    case.expect_close(again, output, "output after inference mode")
    _expect_same_gradients(case, gradients, expected, "after inference mode")


@check("rows of a batch do not influence each other", "an operator mixes rows: a mean or a norm over the batch")
def rows_stay_apart(case: Case) -> None:
    model, inputs = case.fresh()
    case.filled(model)
    together = case.quiet(model, inputs)
    for row in range(len(together)):
        alone = case.quiet(model, {key: value[row : row + 1] for key, value in inputs.items()})
        case.expect_close(alone, together[row : row + 1], f"row {row} alone", factor=10)


@check(
    "inputs of two to five dimensions give what the flattened ones give",
    "forward names the dimensions of its input (`bsi`); write formulas over the last one",
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


class ByKeyword(Holder):
    """Calls its layer with the input by name."""

    def forward(self) -> Tensor:
        output: Tensor = self.layer(input=self.example)
        return output


@check(
    "a module that is called with its input by keyword is adapted like any other",
    "forward of the operator looks into `kwargs` by names of its own",
    hosts=("mlp",),
)
def inputs_by_keyword_are_seen(case: Case) -> None:
    torch.manual_seed(0)
    outputs = []
    layer, example = nn.Linear(6, 4), torch.randn(2, 6)
    for kind in (Holder, ByKeyword):
        host = kind(copy.deepcopy(layer), example)
        case.filled(host, target="layer")
        outputs.append(host().detach())
    case.expect_close(outputs[1], outputs[0], "output for an input by keyword")


@check(
    "deepcopy and pickle give hosts that behave the same, with operators of their own",
    "state that is looked up by the identity of the operator, or kept outside it",
)
def copies_behave_the_same(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    output = case.quiet(model, inputs)
    ways: dict[str, Callable[[], nn.Module]] = {
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "torch.save": lambda: _through_file(model),
    }
    for way, make in ways.items():
        twin = make()
        case.expect_equal(case.quiet(twin, inputs), output, f"output after {way}")
        mine = peftcore.injections(twin)[injection.name]
        with mine.disabled():
            case.expect_equal(case.quiet(twin, inputs), base, f"output of the base after {way}")
        fill(mine, seed=2)
        case.expect_equal(case.quiet(model, inputs), output, f"the first host's output after its {way} changed")


def _through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin: nn.Module = torch.load(file, weights_only=False)
    return twin


class Lockstep(TorchFunctionMode):
    """Lets two threads take turns at every function of torch, so that what they share shows."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with suppress(threading.BrokenBarrierError):  # the other thread is done
            self.barrier.wait(5.0)
        return func(*args, **(kwargs or {}))


def _together(*tasks: Callable[[], Tensor]) -> list[Any]:
    """Results (or errors) of tasks that run in threads of their own, in lockstep."""
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


@check("two threads, with and without the adapter or with different inputs, do not meet", STATE, hosts=ON_TORCH)
def threads_do_not_meet(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    output, other = case.quiet(model, inputs), case.quiet(model, _flipped(inputs))
    case.expect_moved(output, base, "the output")

    def without() -> Tensor:
        with peftcore.activate(model):
            return case.run(model, inputs)

    results = _together(lambda: case.run(model, inputs), without)
    case.expect_close(results[0], output, "the thread with the adapter")
    case.expect_close(results[1], base, "the thread without it")
    results = _together(lambda: case.run(model, inputs), lambda: case.run(model, _flipped(inputs)))
    case.expect_close(results[0], output, "the first thread")
    case.expect_close(results[1], other, "the thread with other inputs")
    case.expect(injection.active, "the adapter is not active any more")


class FailingAt(TorchFunctionMode):
    """Raises in the `at`-th function of torch; counts them when `at` is negative."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.count == self.at:
            raise Interrupted
        self.count += 1
        return func(*args, **(kwargs or {}))


@check("when forward raises, wherever it does, nothing stays behind", STATE, hosts=ON_TORCH)
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
    case.expect(not (wrong := differences(before, trace(model))), f"other than before: {wrong}")


@contextmanager
def _counted_hooks() -> Iterator[list[str]]:
    names: list[str] = []
    stop = registry().manager.add_hookcall_monitoring(
        lambda name, implementations, arguments: names.append(name),
        lambda outcome, name, implementations, arguments: None,
    )
    try:
        yield names
    finally:
        stop()


@check(
    "no plugin hook runs while the host runs forward or backward",
    "forward looks something up that `inject` knows already",
)
def no_hook_runs_in_forward(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    with _counted_hooks() as names:
        _backward(case, model.train(), inputs, injection)
        case.quiet(model, inputs)
    case.expect(not names, f"hooks that ran: {', '.join(sorted(set(names)))}")


@check(
    "torch.compile without graph breaks gives the same outputs and gradients",
    "Python that depends on values of tensors: `.item()`, `if tensor:`",
    hosts=("mlp",),
)
def compiled_equals_eager(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    case.quiet(model, inputs)  # the witness judges the first forward
    output, expected = _backward(case, model, inputs, injection)
    torch.compiler.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    compiled, gradients = _backward(case, model, inputs, injection)
    case.expect_close(compiled, output, "the compiled host's output", factor=10)
    _expect_same_gradients(case, gradients, expected, "compiled")


@check(
    "torch.export gives a program with the same outputs",
    "forward goes another way while it is traced, or depends on values of tensors",
    hosts=("mlp",),
)
def exported_equals_eager(case: Case) -> None:
    model, inputs = case.fresh()
    case.filled(model)
    output = case.quiet(model, inputs)
    program = torch.export.export(model, (), dict(inputs)).module()
    with torch.no_grad():
        case.expect_close(case.host.output(program(**inputs)), output, "the exported program's output", factor=10)
