"""Checks of merging: outputs do not change, a merge that fails changes nothing, and unmerging restores every bit of the
weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import peftcore
from peftcore.contract.method import Tags
from peftcore.errors import CompositionError, MergeError, NotMergeable, RouteError
from peftcore.injection.injection import Injection
from peftcore.testing.kit import Case, NotApplicable, check
from peftcore.testing.tools import differences, overriding, raises, trace

KEEPS: tuple[Any, ...] = ("cpu", "record", "device")


def _mergeable(tags: Tags) -> bool:
    return tags.mergeable


def _unchanged(case: Case, before: dict[str, Any], model: nn.Module, what: str) -> None:
    wrong = differences(before, trace(model))
    case.expect(not wrong, f"{what}: changed: {wrong}")


@check(
    "`overrides` is claimed exactly where the effective tensor is the same whatever tensor it is made of",
    cause="`merged` returns a value of its own, and what other injections do to the tensor before is lost",
    remedy="act on the tensor that is handed in; where that makes no sense, say `overrides = True` in the operator",
    when=_mergeable,
    hosts=("mlp", "llama"),
)
def what_overrides_says_so(case: Case) -> None:
    model, _ = case.fresh(torch.float64)
    injection = case.filled(model, dtype="float64")
    for graft in (each for each in injection.grafts if not each.operator.trains_only):
        tensor = graft.site.weight()
        other = tensor + torch.linspace(0.1, 0.2, tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        with torch.no_grad():
            same = torch.equal(graft.operator.merged(tensor), graft.operator.merged(other))
        claimed = graft.operator.overrides
        case.expect(
            same == claimed, f"{graft.site.path}: overrides={claimed}, and the tensor counts{' for nothing' * same}"
        )


@check(
    "merging keeps the outputs",
    cause="`merged` is not the mathematics of `forward`: another scale, sign, axis or bias",
    remedy="compare the two on one `nn.Linear`; a bias that changes is said in `merged_bias`",
    when=_mergeable,
)
def merging_keeps_the_outputs(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    adapted = case.quiet(model, inputs)
    case.expect_moved(adapted, base, "the filled adapter's output")
    injection.merge()
    for time in ("first", "second", "third"):
        case.expect_close(case.quiet(model, inputs), adapted, f"{time} output when merged")
        case.expect(injection.merged, "not called merged")


ROUNDED = 4e-2
"""The largest accepted relative error of outputs in bfloat16, in the norm over all entries. Rounding the weights gives
an error of 2e-3 (half a unit in the last place), which grows over the layers of a host."""


@check(
    "merging keeps the outputs of a host in bfloat16",
    cause="`forward` computes something else in half precision, or `merged` rounds inside",
    remedy="cast with `self.cast` in `forward`, and in `merged` stay in the dtype of the weight that comes in",
    when=_mergeable,
    hosts=("mlp", "encoder", "llama"),
)
def merging_keeps_the_outputs_in_bfloat16(case: Case) -> None:
    model, inputs = case.fresh(torch.bfloat16)
    injection = case.filled(model)
    adapted = case.quiet(model, inputs)
    injection.merge()
    merged = case.quiet(model, inputs)
    case.expect(merged.dtype == torch.bfloat16, f"the output became {merged.dtype}")
    # Of all numbers together: how far rounding moves a single one is chance, and differs between processors.
    error = ((merged.double() - adapted.double()).norm() / adapted.double().norm()).item()
    case.expect(error <= ROUNDED, f"output when merged: relative error {error:.2e} > {ROUNDED:.0e}")


@check(
    "unmerging restores every bit, whatever was kept",
    cause="`merged` changes the weight that comes in, or the operator, in place",
    remedy="return a new tensor: `weight + update`, never `weight.add_(update)`",
    when=_mergeable,
)
def unmerging_restores_every_bit(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = case.fresh(dtype)
        injection = case.filled(model)
        adapted, before = case.quiet(model, inputs), trace(model)
        for keep in KEEPS:
            injection.merge(keep=keep)
            case.expect(bool(differences(before, trace(model))), "merging changes no tensor")
            injection.unmerge()
            _unchanged(case, before, model, f"merged and unmerged with keep={keep!r} in {dtype}")
            case.expect_equal(case.quiet(model, inputs), adapted, f"output after keep={keep!r}")


@check(
    "with keep=None unmerge and remove refuse, and nothing changes",
    cause="the method keeps a copy of the base, or replaces calls of its injection",
    remedy="leave merging to the core: `merged` says the new weight, and nothing else",
    when=_mergeable,
    hosts=("mlp", "llama"),
)
def nothing_kept_is_nothing_promised(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    adapted = case.quiet(model, inputs)
    injection.merge(keep=None)
    before = trace(model)
    for call in (injection.unmerge, injection.remove, injection.disabled().__enter__):
        with raises(case, MergeError, "undoing a merge that kept nothing", names=injection.name):
            call()
        _unchanged(case, before, model, "an undoing that was refused")
    case.expect(injection.merged, "not called merged any more")
    case.expect_close(case.quiet(model, inputs), adapted, "output")


@check(
    "merging twice changes nothing more, and in another way it is refused",
    cause="`merged` is called where it should not be, or answers differently each time",
    remedy="let it compute only, and leave `injection.merged` alone",
    when=_mergeable,
)
def merging_twice_is_merging_once(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    case.quiet(model, inputs)
    start = trace(model)
    injection.merge()
    once = trace(model)
    injection.merge()
    _unchanged(case, once, model, "merged again")
    for other in ({"keep": "record"}, {"weight": 0.5}, {"into": "same"}, {"max_error": 0.125}):
        with raises(case, MergeError, f"merging again with {other}", names=injection.name):
            injection.merge(**other)
        _unchanged(case, once, model, f"merging again with {other}, which was refused,")
    for _ in range(2):
        injection.unmerge()
        _unchanged(case, start, model, "unmerged")


@check(
    "several injections merge in order, unmerge in the order back, and refuse any other",
    cause="`merged` starts from the base that it saw in `__init__`",
    remedy="start from the weight that comes in: the injections before have left it so",
    when=_mergeable,
)
def several_merge_in_order(case: Case) -> None:
    model, inputs = case.fresh()
    first, second = case.filled(model, 1, name="first"), case.filled(model, 2, name="second")
    if overriding(second):
        raise NotApplicable("two of them do not act together")
    both = case.quiet(model, inputs)
    start = trace(model)
    with raises(case, MergeError, "merging the second under the first", names="first"):
        second.merge()
    _unchanged(case, start, model, "a merge that was refused")
    first.merge()
    middle, between = trace(model), case.quiet(model, inputs)
    case.expect_close(between, both, "the first merged, the second active", factor=3)
    second.merge()
    case.expect_close(case.quiet(model, inputs), both, "both merged", factor=3)
    end = trace(model)
    with raises(case, MergeError, "unmerging the first under the second", names="second"):
        first.unmerge()
    _unchanged(case, end, model, "an unmerge that was refused")
    second.unmerge()
    _unchanged(case, middle, model, "the second unmerged")
    first.unmerge()
    _unchanged(case, start, model, "both unmerged")


@check(
    "merging puts new tensors in the place of those that it changes, writes to none, and changes nothing else",
    cause="`merged` has effects of its own on modes, attributes or the operator",
    remedy="let it compute only: a weight comes in, and one of the same shape goes out",
    when=_mergeable,
)
def merging_changes_values_alone(case: Case) -> None:
    model, inputs = case.fresh(torch.bfloat16)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    injection = case.filled(model)
    case.quiet(model, inputs)
    tensors = {name: value.clone() for name, value in injection.state_dict().items()}
    before = trace(model)
    injection.merge()
    after = trace(model)
    added = [key for key in after if key not in before]
    fresh = [key.partition(" of ")[2] for key in added if key.startswith("values of ")]
    case.expect(all(name.endswith("bias") for name in fresh), f"a merge added {fresh}")
    passing = ("values of ", "identity of ", "order of ", *added)
    case.expect(not (wrong := differences(before, after, passing)), f"other than values changed: {wrong}")
    for key in (key for key in before if key.startswith("identity of ")):
        values = before[key.replace("identity", "values", 1)]
        case.expect_equal(
            before[key].tensor.detach(), values, f"{key.removeprefix('identity of ')}, which others may hold"
        )
    dtypes = {key for key in before if key.startswith("values of ") and before[key].dtype != after[key].dtype}
    case.expect(not dtypes, f"dtypes changed: {sorted(dtypes)[:4]}")
    for name, value in injection.state_dict().items():
        case.expect_equal(value, tensors[name], f"the operators' own {name}")


@check(
    "baking leaves a plain model with the effect, whose state dict loads into a plain base",
    cause="`inject` or an operator leaves something on the host, or `merged` says a part of the effect only",
    remedy="record with the surgeon's verbs; say the weight in `merged` and the bias in `merged_bias`",
    when=_mergeable,
)
def baking_leaves_a_plain_model(case: Case) -> None:
    model, inputs = case.fresh()
    plain = trace(model)
    injection = case.filled(model)
    adapted = case.quiet(model, inputs)
    injection.bake()
    case.expect(not peftcore.injections(model), "an injection is left")
    case.expect_close(case.quiet(model, inputs), adapted, "output when baked")
    baked = trace(model)
    added = [key.partition(" of ")[2] for key in baked if key not in plain and key.startswith("values of ")]
    passing = ("values of ", "identity of ", "order of ", *(f"requires_grad of {name}" for name in added))
    case.expect(not (wrong := differences(plain, baked, passing)), f"left behind: {wrong}")
    base, _ = case.fresh()
    for name in added:  # new biases: a plain base needs slots for them
        owner, _, leaf = name.rpartition(".")
        case.expect(leaf == "bias", f"baking added {name}")
        base.get_submodule(owner).register_parameter(leaf, nn.Parameter(torch.zeros_like(model.get_parameter(name))))
    base.load_state_dict(model.state_dict())
    case.expect_equal(
        case.quiet(base, inputs), case.quiet(model, inputs), "output of a plain base with the baked weights"
    )


@check(
    "an effect that is not finite is refused, and nothing changes",
    cause="`merged` hides numbers that are not finite (nan_to_num, clamp)",
    remedy="let them through: the core refuses the merge and changes nothing",
    when=_mergeable,
)
def what_is_not_finite_is_refused(case: Case) -> None:
    for number in (float("nan"), float("inf")):
        model, inputs = case.fresh()
        injection = case.filled(model)
        case.quiet(model, inputs)
        last = list(injection.parameters())[-1]
        with torch.no_grad():
            last.view(-1)[-1] = number
        before = trace(model)
        for keep in (*KEEPS, None):
            with raises(case, MergeError, f"merging {number}"):
                injection.merge(keep=keep)
            _unchanged(case, before, model, f"a merge of {number} that was refused")
        case.expect(not injection.merged, "called merged")
        with raises(case, MergeError, f"baking {number}"):
            injection.bake()
        _unchanged(case, before, model, f"a bake of {number} that was refused")


@check(
    "fifty merges and unmerges in bfloat16 drift by nothing",
    cause="`merged` counts, draws or keeps something from call to call",
    remedy="make it a function of the weight and the operator's tensors",
    when=_mergeable,
    hosts=("mlp", "llama", "convnet"),
)
def fifty_merges_drift_by_nothing(case: Case) -> None:
    model, _ = case.fresh(torch.bfloat16)
    injection = case.filled(model)
    before = trace(model)
    injection.merge()
    merged = trace(model)
    injection.unmerge()
    for cycle in range(1, 50):
        injection.merge(keep=KEEPS[cycle % 3])
        wrong = differences(merged, trace(model), passing="identity of") if cycle % 7 == 0 else ""
        case.expect(not wrong, f"merge {cycle} differs from the first: {wrong}")
        injection.unmerge()
    _unchanged(case, before, model, "after 50 merges")


@check(
    "merging in half precision rounds once: it gives what float32 gives, cast",
    cause="`merged` rounds inside: it casts to the host's dtype before the sum is complete",
    remedy="compute in the dtype of the weight that comes in; the core rounds once, at the end",
    when=_mergeable,
)
def merging_rounds_once(case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        low, _ = case.fresh(dtype)
        high, _ = case.fresh(dtype)
        for model in (low, high.float()):
            case.filled(model).bake()
        wide = dict(high.named_parameters())
        for name, value in low.named_parameters():
            case.expect_equal(value.detach(), wide[name].detach().to(dtype), f"{name} in {dtype}")


@check(
    "a method that cannot merge says so with NotMergeable, and nothing changes",
    cause="`mergeable` is not declared though every operator defines `merged`",
    remedy="declare `mergeable=True`, or take `merged` away",
    when=lambda tags: not tags.mergeable,
)
def methods_that_cannot_merge_say_so(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    adapted = case.quiet(model, inputs)
    before = trace(model)
    for call in (injection.merge, injection.bake):
        with raises(case, NotMergeable, "merging", names=case.method.name):
            call()
        _unchanged(case, before, model, "a merge that was refused")
    case.expect(not injection.merged, "called merged")
    case.expect_equal(case.quiet(model, inputs), adapted, "output after the refusal")


@check(
    "a merged injection acts in every forward: no merge under another choice, and no other choice while it is merged",
    cause="the method chooses or merges by itself, or replaces calls of its injection",
    remedy="leave choosing and merging to the core: `merged` says the new weight, and nothing else",
    when=_mergeable,
    hosts=("mlp", "llama"),
)
def merging_goes_with_the_choice(case: Case) -> None:
    model, inputs = case.fresh()
    other, injection = case.filled(model, 1, name="other"), case.filled(model, 2)
    peftcore.activate(model, injection.name)
    rows = len(next(iter(inputs.values())))
    choices: dict[str, Callable[[], Any]] = {
        "no injection": lambda: peftcore.activate(model),
        "another injection": lambda: peftcore.activate(model, other.name),
    }
    if case.tags.per_row and all(site.separable for site in injection.sites):
        choices["a route"] = lambda: peftcore.route(model, [injection.name, *[None] * (rows - 1)])
    if case.tags.per_row and not any(graft.site.form == "attention" for graft in injection.grafts):
        choices["a composition"] = lambda: peftcore.activate(model, peftcore.Sum(injection.name, other.name))
    refusals = MergeError, RouteError, CompositionError
    for what, choose in choices.items():
        with choose():
            before = trace(model)
            for act in (injection.merge, injection.bake):
                with raises(case, refusals, f"merging under {what}", names=injection.name):
                    act()
                _unchanged(case, before, model, f"a merge under {what}")
    injection.merge()
    merged = case.quiet(model, inputs)
    before = trace(model)
    for what, choose in choices.items():
        with raises(case, MergeError, f"choosing {what} while merged", names=injection.name):
            choose()
        case.expect(injection.active and not other.active, f"choosing {what} while merged, refused, changed the choice")
        _unchanged(case, before, model, f"choosing {what} while merged")
    case.expect_equal(case.quiet(model, inputs), merged, "output after choices that were refused")


class _Bent(nn.Module):
    """A parametrization (of `torch.nn.utils.parametrize`) that can represent only some weights."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


def _bend(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, _Bent())


def _prune(module: nn.Module, name: str) -> None:
    prune.l1_unstructured(module, name, 0.3)  # type: ignore[no-untyped-call]


COMPUTED: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "a parametrization": _bend,
    "pruning": _prune,
}


def _compute(model: nn.Module, injection: Injection, how: Callable[[nn.Module, str], Any]) -> None:
    """Replace the weights on which an injection acts by computed weights, such as weight norm, by calling `how`. Tied
    weights are left out.

    Raises:
        NotApplicable: all weights on which the injection acts are tied or missing.
    """
    done: set[tuple[int, str]] = set()
    held = [id(each) for module in model.modules() for each in module._parameters.values()]
    for site in (site for graft in injection.grafts for site in graft.holders):
        path, _, name = site.tensor.rpartition(".")
        owner = site.module.get_submodule(path)
        weight = owner._parameters.get(name)
        if weight is None or weight.dim() < 2 or held.count(id(weight)) > 1:
            continue
        if weight.flatten(1).any(1).all():  # of a row of zeros, as of padding, weight norm makes none of numbers
            how(owner, name)
            done.add((id(owner), name))
    if not done:
        raise NotApplicable("it acts on no weight that one module alone holds")


@check(
    "a weight that its module computes (weight norm, pruning, any parametrization) is merged, baked and comes back",
    cause="`merged` starts from a tensor that it read in `__init__`, or from a parameter of the module",
    remedy="start from the weight that comes in",
    when=_mergeable,
    hosts=("mlp", "llama", "convnet"),
)
def computed_weights_merge_as_any(case: Case) -> None:
    for what, how in COMPUTED.items():
        model, inputs = case.fresh()
        injection = case.filled(model)
        _compute(model, injection, how)
        adapted, before = case.quiet(model.requires_grad_(False).eval(), inputs), trace(model)
        injection.merge()
        case.expect(bool(differences(before, trace(model))), f"{what}: merging changes nothing")
        case.expect_close(case.quiet(model, inputs), adapted, f"{what}: output when merged")
        injection.unmerge()
        _unchanged(case, before, model, f"{what}: merged and unmerged")
        case.expect_equal(case.quiet(model, inputs), adapted, f"{what}: output when unmerged")
        injection.bake()
        case.expect_close(case.quiet(model, inputs), adapted, f"{what}: output when baked")


def _tie(model: nn.Module, injection: Injection) -> Tensor:
    """Tie a tensor of the host: register it in another module of the host too, and return it. It is the first tensor on
    which the injection (of a copy of the host) acts."""
    for graft in injection.grafts:
        module = model.get_submodule(graft.site.module_path).get_submodule(graft.site.tensor.rpartition(".")[0])
        tensor = module._parameters.get(graft.site.tensor.rpartition(".")[2])
        if tensor is not None:
            twin = nn.Module()
            twin.register_parameter("held", tensor)
            model.add_module("twin", twin)
            return tensor
    raise NotApplicable("it adds tensors and touches none that exists")


@check(
    "a tensor that others hold too is merged only where they are adapted alike; else the merge is refused",
    cause="the method writes into the host's tensors by itself, so ties are not seen",
    remedy="write nothing: return the new weight in `merged`, and the core looks for others that hold it",
    when=_mergeable,
    hosts=("mlp", "encoder", "llama", "gpt2"),
)
def tied_tensors_are_never_changed_silently(case: Case) -> None:
    scout, _ = case.fresh()
    model, inputs = case.fresh()
    tensor = _tie(model, case.apply(scout))
    start = tensor.detach().clone()
    injection = case.filled(model)
    adapted = case.quiet(model, inputs)
    holders = [site for graft in injection.grafts for site in graft.holders]
    alike = any(f"{site.module_path}.{site.tensor}".lstrip(".") == "twin.held" for site in holders)
    tables = [(module._parameters, key) for module in model.modules() for key, each in module._parameters.items()
              if each is tensor]  # fmt: skip
    before = trace(model)
    try:
        injection.merge()
    except MergeError:
        case.expect(not alike, "refused though every holder is adapted alike")
        _unchanged(case, before, model, "a merge that was refused")
        return
    case.expect(alike or torch.equal(tensor, start), "the merge changed a tensor that another module holds")
    case.expect(len({id(table[key]) for table, key in tables}) == 1, "the tie is cut")
    case.expect_close(case.quiet(model, inputs), adapted, "output when merged")


@check(
    "removing a merged injection restores the base to the bit",
    cause="`merged` changes the weight that comes in, or the method replaces calls of its injection",
    remedy="return a new tensor, and leave removing to the core",
    when=_mergeable,
)
def removing_a_merged_injection_restores_the_base(case: Case) -> None:
    for keep in KEEPS:
        model, inputs = case.fresh()
        base, before = case.quiet(model, inputs), trace(model)
        injection = case.filled(model)
        injection.merge(keep=keep)
        case.quiet(model, inputs)
        injection.remove()
        _unchanged(case, before, model, f"merged with keep={keep!r} and removed")
        case.expect_equal(case.quiet(model, inputs), base, f"output after keep={keep!r}")
