"""LQER beside the authors' code and its equation, what it sees of the data, and its life on packed bases."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_packed import PACKAGES, WIDTH, assert_from_dense, assert_merges, by_equation, host, packed
from equation_in_float64 import KINDS, adapted, assert_equation, experts, hosted
from peft_pairs import OUTPUTS, difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import TrainingError
from peftcore.testing import against, conformance, frozen, same_defaults

HOSTS = ("mlp", "encoder", "llama", "bert", "t5", "gpt2", "moe", "mistral", "vit", "unet", "dit", "convnet")
SAME = "the kit's batches differ in what counts of the output; the inputs, which is what this looks at, are the same"
SEEN = "what a host in half precision shows of its inputs is rounded, so the factors are others"
NOISE = "what rounding loses is noise: with the weight in bfloat16 its principal directions are others"


@conformance(
    "lqer",
    options={"*": {"rank": 2, "train_factors": True}},
    expected_failures={
        **{f"data_counts_where_it_is_asked_for-{each}": SAME for each in ("mlp", "encoder", "llama")},
        **{f"merging_rounds_once-{each}": SEEN for each in HOSTS},
        **{f"low_precision_hosts_keep_their_dtype-{each}": NOISE for each in ("llama", "moe")},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def batches() -> list[tuple[Tensor]]:
    """Two batches, whose channels have many sizes; one channel is silent."""
    x, generator = host()[1], torch.Generator().manual_seed(2)
    found = [each * torch.randn(WIDTH, generator=generator).exp() for each in (x, x.flip(0))]
    for each in found:
        each[..., 5] = 0
    return [(each,) for each in found]


def corrected(gap: Tensor, x: Tensor | None, rank: int) -> Tensor:
    """``B A`` in float64, by another decomposition than the method's."""
    columns = torch.ones(gap.shape[1]) if x is None else x.clamp(min=1e-4)
    scaled = gap.double() * columns.double()
    vectors = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -rank:]
    return vectors @ vectors.T @ scaled / columns.double()


CODE: Any = {
    "repository": "ChengZhang-98/lqer",
    "commit": "88b6960",
    "script": "src/lqer/approximate/lqer_act.py",
}
NUMBERS = Path(__file__).parent / "numbers" / "lqer.json"


@against("authors", "lqer", **CODE)
def test_the_factors_are_the_authors() -> None:
    """Norms of E, of E - B A and of B A."""
    model, _ = host()
    options: dict[str, Any] = {"target": ["0", "2"], "rank": 3, "scheme": "bnb-nf4", "factor_bits": None}
    pytest.importorskip("bitsandbytes")
    injection = peftcore.apply(model, "lqer", data=batches(), **options)
    assert not list(injection.parameters())
    held = packed("bnb-nf4")
    for path, norms in frozen(NUMBERS).items():
        operator, layer = injection.operators[path], held.get_submodule(path)
        product = operator.B @ operator.A
        gap = host()[0].get_submodule(path).weight - peftcore.registry.plugins.layer_of(layer, "weight").read(
            layer, "weight"
        )
        for found, wanted in zip((gap, gap - product, product), norms, strict=True):
            # The gap is a tenth of the weights, which bitsandbytes reads in float32, on each processor in its way.
            assert abs(found.norm().item() / wanted - 1) <= 1e-5
    with pytest.raises(TrainingError, match="frozen"):
        injection.optimizer(torch.optim.SGD, lr=0.1)


@against("authors", "lqer", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """What the factors put back; of a silent input as much as of others, by its least size."""
    pytest.importorskip("bitsandbytes")
    options: dict[str, Any] = {"rank": 3, "scheme": "bnb-nf4", "factor_bits": None, "train_factors": True}
    injection = peftcore.apply(host()[0], "lqer", target=["0", "2"], data=batches(), **options)
    for path, told in frozen(NUMBERS, "start").items():
        operator = injection.operators[path]
        assert difference((operator.B @ operator.A)[:4, :8], torch.tensor(told)) <= 1e-5


@against("authors", "lqer", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(host()[0], "lqer", target=["0", "2"], data=batches()).config
    same_defaults(config, frozen(NUMBERS, "defaults"))


def in_int8(weight: Tensor) -> Tensor:
    unit = weight.abs().amax(1, keepdim=True) / 127
    return (weight / unit).round() * unit


def seen(kind: str, x: Tensor) -> Tensor | None:
    """The sizes of the inputs, one for each column of the matrix; None where nobody sees them."""
    if kind in ("experts", "grouped"):
        return None
    if kind == "embedding":
        return torch.stack([(x == token).double().mean() for token in range(9)])
    if kind == "convolution":
        return x.abs().mean((0, 2, 3)).repeat_interleave(6)
    return x.abs().flatten(0, -2).mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_count_by_the_size_of_inputs(kind: str) -> None:
    """On all kinds of layers; of two batches the larger mean, channel for channel."""
    x = hosted(kind)[1]
    other = x.flip(0)[:1] if kind == "embedding" else 2 * x.roll(1, 1)
    data = [lambda model: model(x), lambda model: model(other)]
    operator = adapted(kind, "lqer", rank=2, scheme="int8", factor_bits=None, data=data)[2]
    assert not list(operator.parameters())
    sizes = [seen(kind, each) for each in (x, other)]
    largest = None if sizes[0] is None or sizes[1] is None else torch.maximum(sizes[0], sizes[1])
    parts = [(weight.float().flatten(1), tensors) for weight, tensors in experts(kind, operator)]
    for matrix, tensors in parts:
        wanted = corrected(matrix - in_int8(matrix), largest, 2)
        assert difference(tensors["B"] @ tensors["A"].flatten(1), wanted) <= OUTPUTS


@pytest.mark.parametrize("bits", [8, 4])
def test_factors_in_few_bits(bits: int) -> None:
    """Blocks of 16 values of a direction, the last one short, each with its own scale."""
    model, data = nn.Sequential(nn.Linear(24, 40)), [(torch.randn(9, 24),)]
    plain, rounded = (
        peftcore.apply(deepcopy(model), "lqer", target="0", rank=3, factor_bits=each, data=data).operators["0"]
        for each in (None, bits)
    )
    levels = 2 ** (bits - 1) - 1
    for exact, found in ((plain.A, rounded.A), (plain.B.T, rounded.B.T)):
        for start in range(0, exact.shape[1], 16):
            block = exact[:, start : start + 16]
            unit = block.abs().amax(1, keepdim=True) / levels
            assert difference(found[:, start : start + 16], (block / unit).round() * unit) <= OUTPUTS
        assert (found != exact).any()


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """What it computes once it has trained."""

    def changed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        base = in_int8(weight.detach().float().flatten(1)).double() + tensors["B"] @ tensors["A"].flatten(1)
        return base.view(weight.shape)

    data = [lambda model: model(hosted(kind)[1])]
    assert_equation(kind, "lqer", changed, rank=3, scheme="int8", train_factors=True, data=data)


@pytest.mark.parametrize("scheme", PACKAGES)
def test_from_a_dense_base(scheme: str, tmp_path: Path) -> None:
    """Trained, and as it is: a correction that brings the packed host nearer to the dense one, wherever it lies."""
    assert_from_dense(scheme, "lqer", tmp_path / "trained", rank=3, train_factors=True, data=batches())
    (model, x), theirs = host(), packed(scheme)
    injection = peftcore.apply(model, "lqer", target=["0", "2"], rank=32, scheme=scheme, data=[(x,)])
    injection.save(tmp_path / "frozen")
    exact, expected = host()[0](x), model(x)
    assert (expected - exact).norm() < 0.9 * (theirs(x) - exact).norm()
    loaded = peftcore.load(theirs, tmp_path / "frozen")
    assert difference(theirs(x), by_equation(packed(scheme), loaded, x)) <= OUTPUTS
    assert difference(theirs(x), expected) <= OUTPUTS
    packed(scheme, model)
    assert difference(model(x), expected) <= OUTPUTS
    for each in (injection, loaded):
        assert_merges(each, x, expected)


def test_on_a_packed_base_there_is_nothing_to_put_back() -> None:
    model = packed("nf4")
    x = torch.randn(3, 64)
    base = model(x)
    injection = peftcore.apply(model, "lqer", target="0", data=batches())
    assert not any(value.any() for value in injection.state_dict().values())
    assert torch.equal(model(x), base)


def test_inputs_by_name_are_seen_and_nobody_looks_afterwards() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model, x = Named(), torch.randn(4, 8).mul(torch.arange(1, 9))
    injection = peftcore.apply(model, "lqer", data=[(x,)], target="layer", rank=2, scheme="int8", factor_bits=None)
    weight, operator = model.layer.weight.detach(), injection.operators["layer"]
    assert difference(operator.B @ operator.A, corrected(weight - in_int8(weight), x.abs().mean(0), 2)) <= OUTPUTS
    assert not model.layer._forward_pre_hooks
