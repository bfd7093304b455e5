"""IR-QLoRA beside figures of the authors' code, beside its equations, and in the three states of its host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_hosts import (
    SCHEMES,
    STATES,
    TARGET,
    adapted,
    assert_packed_is_simulated,
    assert_saved_fits,
    assert_trains_and_merges,
    dense,
    fill,
    gradients,
    inputs,
    packed,
)
from peft_pairs import MOVED, OUTPUTS, difference
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.injection.quantization import scheme
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.checks_forward import WAYS
from peftcore_quantized.backends import _icq
from peftcore_quantized.backends.reference import DYNAMIC, NORMAL

RANK, ALPHA = 4, 8.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
CODE: Any = {"repository": "htqin/IR-QLoRA", "commit": "e6fef4a", "script": "utils.py"}
NUMBERS = Path(__file__).parent / "numbers" / "ir_qlora.json"


SHIFTS = "which shift is best depends on the last bits of a weight: in bfloat16 many blocks have another"


# A rank that divides all widths, and a scale of 1, not of 16 / 2, which saturates attention. The search of the
# quantizer in few steps: simulated packing runs it in every forward.
@conformance(
    "ir_qlora",
    options={
        "*": {"rank": 2, "alpha": 2.0, "scheme_options": {"tau_steps": 1}},
        "moe": {"rank": 2, "alpha": 0.5, "scheme_options": {"tau_steps": 1}},  # a large update brings experts together
    },
    expected_failures={f"low_precision_hosts_keep_their_dtype-{host}": SHIFTS for host in ("llama", "mistral")},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@against("authors", "ir_qlora", **CODE)
def test_figures_of_the_authors_code() -> None:
    """The codes of the weight and of its shifts, and the layer's forward."""
    numbers = frozen(NUMBERS)
    generator = torch.Generator().manual_seed(43)
    weight, x = torch.randn(128, 128, generator=generator) * 0.05, torch.randn(3, 128, generator=generator)
    A, B = torch.randn(4, 128, generator=generator) * 0.1, torch.randn(128, 4, generator=generator) * 0.1
    host = nn.Sequential(nn.Linear(128, 128, bias=False))
    host[0].weight.data.copy_(weight)
    peftcore.quantize(host, "nf4-icq", double_quant=True)
    codes, tau = host[0].codes.long(), host[0].tau_codes.long()
    assert [int(codes.sum()), int((codes * torch.arange(8192)).sum())] == numbers["codes"]
    assert [int(tau.sum()), int((tau * torch.arange(256)).sum())] == numbers["shifts"]
    assert host[0].tau_scale.item() == pytest.approx(numbers["largest shift"], rel=1e-6)
    (operator,) = peftcore.apply(host, "ir_qlora", target="0", rank=4, alpha=8.0).operators.values()
    for parameter, value in ((operator.A, A), (operator.B, B), (operator.b1, 0.7), (operator.b2, -0.3)):
        parameter.data.copy_(torch.as_tensor(value))
    y = host(x)
    assert difference(y[0, :6], torch.tensor(numbers["outputs"])) <= 1e-5
    assert y.norm().item() == pytest.approx(numbers["norm of outputs"], rel=1e-6)


@against("authors", "ir_qlora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    host = nn.Sequential(nn.Linear(640, 128))
    (operator,) = peftcore.apply(host, "ir_qlora", target="0", rank=64).operators.values()
    for name, told in frozen(NUMBERS, "start").items():
        same_start(operator.get_parameter(name), told)


@against("authors", "ir_qlora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    (operator,) = peftcore.apply(nn.Sequential(nn.Linear(128, 128)), "ir_qlora", target="0", rank=4).operators.values()
    assert {name: each.numel() for name, each in operator.named_parameters()} == frozen(NUMBERS, "trains")


@against("authors", "ir_qlora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(64, 64)), "ir_qlora", target="0")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


def entropy(codes: Tensor) -> float:
    p = codes.long().bincount().double() / len(codes)
    return float(-(p[p > 0] * p[p > 0].log2()).sum())


@pytest.mark.parametrize("size", [(16, 64), (7, 45), (150, 128)], ids=["blocks", "part", "groups"])
def test_calibration_makes_the_codes_most_informative(size: tuple[int, int]) -> None:
    """Block for block, by trying every shift in turn and keeping the first of the best. Blocks that are cut off, and
    more than one scale of the shifts, among them."""
    torch.manual_seed(0)
    weight, sigma = (torch.randn(size) + 0.3) * torch.rand(size[0], 1), 1 / 1.8481309
    module: Any = scheme("nf4-icq", tau_steps=5, tau_range=0.2).module(weight)
    levels, dynamic, shifted, taus = torch.tensor(NORMAL).double(), torch.tensor(DYNAMIC).double(), [], []
    gained = 0.0
    for block in weight.double().view(-1).split(64):
        middle = block.sort().values[(len(block) - 1) // 2]
        absmax, best = (block - middle).abs().max(), -1.0
        for step in range(-5, 6):
            tau = middle + 0.2 * sigma * step / 5 * absmax
            scale = (block - tau).abs().max()
            codes = ((block - tau)[:, None] / scale - levels).abs().argmin(1)
            if entropy(codes) > best + 1e-9:
                best, kept = entropy(codes), (tau, scale * levels[codes])
        taus.append(kept[0])
        shifted.append(kept[1])
        gained += best - entropy((block[:, None] / block.abs().max() - levels).abs().argmin(1))
    stored = []
    for group in torch.stack(taus).split(256):
        nearest = (group[:, None] / group.abs().max() - dynamic).abs().argmin(1)
        stored.append(dynamic[nearest] * group.abs().max())
    expected = [block + tau for block, tau in zip(shifted, torch.cat(stored), strict=True)]
    assert difference(module.weight, torch.cat(expected).view(size)) <= 1e-6
    assert gained > 0, "as informative without"


class Experts(nn.Module):
    """Three experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,eni->eno", self.weight, x)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], bool]] = {
    "linear": (lambda: nn.Linear(16, 8), lambda: torch.randn(5, 16), False),
    "conv1d-of-transformers": (lambda: Conv1D(8, 16), lambda: torch.randn(5, 16), True),
    "grouped": (lambda: nn.Conv2d(16, 8, (3, 2), groups=2), lambda: torch.randn(2, 16, 5, 5), False),
    "embedding": (lambda: nn.Embedding(16, 8), lambda: torch.arange(16), True),
    "experts": (Experts, lambda: torch.randn(3, 5, 16), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """Group by group, in float64: W' = Q + s (B + b2 R)(A + b1 P)."""
    build, draw, transposed = KINDS[kind]
    host = nn.Sequential(build()).double()
    x = draw()
    x = x.double() if x.is_floating_point() else x
    base = {name: value.detach().clone() for name, value in host.named_parameters()}
    injection = peftcore.apply(
        host, "ir_qlora", target="0.weight" if kind == "experts" else "0", dtype="float64", **OPTIONS
    )
    fill(injection)
    (operator,) = injection.operators.values()
    weight = base["0.weight"].T if transposed else base["0.weight"]
    stacks = weight if kind == "experts" else weight.unsqueeze(0)
    pieces = stacks.flatten(2)  # [experts, out, in * kernel]
    Q = scheme("nf4-icq").module(pieces.flatten(0, 1)).weight.view(stacks.shape)  # type: ignore[operator]
    A, B = (each if kind == "experts" else each.unsqueeze(0) for each in (operator.A.detach(), operator.B.detach()))
    A, B, expected = A.flatten(2).clone(), B.clone(), []
    for a, b, q in zip(A, B, Q, strict=True):
        columns, rows = a.shape[1] // RANK, b.shape[0] // RANK
        for j in range(RANK):
            a[j, j * columns : (j + 1) * columns] += operator.b1.item() / columns
            b[j * rows : (j + 1) * rows, j] += operator.b2.item()
        expected.append(q + ALPHA / RANK * (b @ a).view(q.shape))
    effective = torch.stack(expected) if kind == "experts" else expected[0]
    stored = effective.T if transposed else effective
    wanted = functional_call(_plain(build, base), {"0.weight": stored}, (x,))
    assert difference(host(x), wanted) <= 1e-10
    assert difference(host(x), _plain(build, base)(x)) >= MOVED
    injection.merge()
    assert difference(host.get_parameter("0.weight"), stored) <= 1e-10


def _plain(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    plain = nn.Sequential(build()).double()
    plain.load_state_dict(state)
    return plain


def test_equation_on_a_packed_base() -> None:
    """As in the authors' forward: a mean of each group of inputs, a repetition of each number inside."""
    model, injection = adapted("others", "ir_qlora", "nf4-icq", **OPTIONS)
    x, plain = inputs(), packed("nf4-icq")
    for path in TARGET:
        operator, layer = injection.operators[path], plain.get_submodule(path)
        h = x @ operator.A.T + operator.b1 * torch.stack([part.mean(1) for part in x.chunk(RANK, 1)], 1)
        repeated = torch.cat([h[:, j : j + 1].expand(-1, layer.out_features // RANK) for j in range(RANK)], 1)
        y = layer(x) + ALPHA / RANK * (h @ operator.B.T + operator.b2 * repeated)
        assert difference(y, layer(x)) >= MOVED
        x = torch.tanh(y) if path == "first" else y
    assert difference(model(inputs()), x) <= OUTPUTS


def test_starts_on_the_packed_base_with_closed_gates() -> None:
    """B and both gates are zero; the gate behind B trains from the first step, as B does."""
    model = packed("nf4-icq")
    injection = peftcore.apply(model, "ir_qlora", target=TARGET, **OPTIONS)
    assert torch.equal(model(inputs()), packed("nf4-icq")(inputs()))
    assert sum(p.numel() for p in injection.parameters()) == 2 * (RANK * (64 + 128) + 2)
    _, found = gradients(model, injection.parameters())
    names = [name.rpartition(".")[2] for name, _ in injection.operators["first"].named_parameters()]
    moving = {name: bool(g.abs().max() > 0) for name, g in zip(names, found[: len(names)], strict=True)}
    assert moving == {"A": False, "B": True, "b1": False, "b2": True}


def test_dropout_leaves_the_means_alone() -> None:
    model, injection = adapted("others", "ir_qlora", "nf4-icq", **OPTIONS, dropout=0.5)
    expected = adapted("others", "ir_qlora", "nf4-icq", **OPTIONS)[0](inputs())
    assert difference(model.eval()(inputs()), expected) <= 1e-6
    assert difference(model.train()(inputs()), expected) > 0.01
    for operator in injection.operators.values():
        operator.A.data.zero_()
    assert torch.equal(model.train()(inputs()), model.eval()(inputs()))
    with pytest.raises(UnsupportedSite, match="quantize first"):
        adapted("dense", "ir_qlora", "nf4-icq", **OPTIONS, dropout=0.5)


@pytest.mark.parametrize("act", [peftcore.apply, peftcore.plan])
def test_the_rank_has_to_divide(act: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedSite, match="must divide 64 inputs and 128 outputs"):
        act(dense(), "ir_qlora", target="first", rank=6)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The blocks of which the calibration is looked for, from nothing on."""
    seen, search = [], _icq.calibration

    def counted(blocks: Tensor, *options: Any) -> Tensor:
        seen.append(blocks)
        return search(blocks, *options)

    monkeypatch.setattr(_icq, "calibration", counted)
    monkeypatch.setattr(_icq, "_kept", {})
    return seen


def test_a_dense_model_is_calibrated_once(searches: list[Tensor]) -> None:
    """In training and in evaluation, merged, and packed in the end."""
    model, injection = adapted("dense", "ir_qlora", "nf4-icq", **OPTIONS)
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.01)
    for _ in range(3):
        model.train()(inputs()).square().sum().backward()
        optimizer.step()
        model.eval()(inputs())
    injection.merge()
    injection.unmerge()
    peftcore.quantize(model, "nf4-icq", target=TARGET, double_quant=True, tau_steps=4)
    assert len(searches) == 2


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_written_to_are_calibrated_again(way: str, searches: list[Tensor]) -> None:
    """Whether torch counts the write or not; the output is that of a model that never had other weights."""
    model, _ = adapted("dense", "ir_qlora", "nf4-icq", **OPTIONS)
    before = model(inputs())
    with torch.no_grad():
        WAYS[way](model.first.weight)
        model.second.weight.data[3] = model.second.weight.data[5].clone()
        model.second.weight.data[[7, 9]] = model.second.weight.data[[9, 7]]  # the same values elsewhere
    found = model(inputs())
    assert len(searches) == 4
    _icq._kept.clear()
    fresh, _ = adapted("dense", "ir_qlora", "nf4-icq", **OPTIONS)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(found, fresh(inputs()))
    assert difference(found, before) >= MOVED


def test_calibrations_are_kept_of_so_many_weights(searches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_icq, "KEPT", 2)
    weights = [torch.randn(4, 64) for _ in range(3)]
    for number in (0, 1, 0, 2, 0, 1):  # the one that was not wanted for longest goes
        scheme("nf4-icq", tau_steps=2).module(weights[number])
    assert [int(blocks[0, 0] == weights[1][0, 0]) for blocks in searches] == [0, 1, 0, 1]
    assert len(_icq._kept) == 2


@SCHEMES
def test_packed_is_simulated(scheme: str) -> None:
    assert_packed_is_simulated("ir_qlora", scheme, **OPTIONS)


@pytest.mark.parametrize("scheme", ["nf4-icq", "nf4", "bnb-nf4", "int8", "torchao-int8", "hqq-4"])
@pytest.mark.parametrize("state", STATES)
def test_trains_and_merges(state: str, scheme: str) -> None:
    assert_trains_and_merges(state, "ir_qlora", scheme, **OPTIONS)


@pytest.mark.parametrize("loaded", STATES)
@pytest.mark.parametrize("saved", STATES)
def test_saved_in_one_state_fits_the_others(tmp_path: Path, saved: str, loaded: str) -> None:
    assert_saved_fits(tmp_path, saved, loaded, "ir_qlora", "nf4-icq", **OPTIONS)
