"""Products by oneDNN beside float64, and where torch makes them itself."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from core_toys import stir
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftcore
from peftcore.layers import kernels
from peftcore.layers.kernels import products

pytestmark = pytest.mark.skipif(products._ONEDNN is None, reason="this build of torch has no oneDNN")

Made = list[torch.Size]


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Shapes of what oneDNN made; here it suits every processor and every size."""
    seen: Made = []
    operator = products._ONEDNN
    assert operator is not None

    def recorded(*given: Any) -> Tensor:
        product = operator(*given)
        seen.append(product.shape)
        return product

    monkeypatch.setattr(products, "_ONEDNN", recorded)
    monkeypatch.setattr(products, "SUITS", True)
    monkeypatch.setattr(products, "MANY", 0)
    monkeypatch.setattr(products, "SOME", 0)
    return seen


LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "as it is": torch.randn,
    "transposed": lambda n, m: torch.randn(m, n).T,
    "part of wider rows": lambda n, m: torch.randn(n, 2 * m)[:, 1 : m + 1],
    "one row for all": lambda n, m: torch.randn(1, m).expand(n, m),
}
SUITED = {"as it is"}, {"as it is", "transposed"}
"""Rows and weights that oneDNN is given; of others it makes copies, or products by its slow reference."""


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("of_rows", LAYOUTS)
@pytest.mark.parametrize("size", [(4, 2, 3), (7, 33, 5), (130, 64, 257)])
def test_a_product(size: tuple[int, int, int], of_rows: str, of_weight: str, biased: bool, made: Made) -> None:
    n, inputs, outputs = size
    rows, weight = LAYOUTS[of_rows](n, inputs), LAYOUTS[of_weight](outputs, inputs)
    bias = torch.randn(outputs) if biased else None
    kept = [each.clone() for each in (rows, weight)]
    with torch.no_grad():
        found = products.linear(rows, weight, bias)
    expected = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
    assert made == ([found.shape] if of_rows in SUITED[0] and of_weight in SUITED[1] else [])
    assert torch.equal(rows, kept[0]) and torch.equal(weight, kept[1])


class Counted(Tensor):
    """More than numbers."""


def several(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


TORCHS_OWN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], AbstractContextManager[Any]]]] = {
    "somebody differentiates": (lambda each: each, torch.enable_grad),
    "double": (Tensor.double, nullcontext),
    "bfloat16": (Tensor.bfloat16, nullcontext),
    "a subclass": (lambda each: each.as_subclass(Counted), nullcontext),
    "oneDNN is switched off": (lambda each: each, lambda: torch.backends.mkldnn.flags(enabled=False)),
    "operations are counted": (lambda each: each, lambda: FlopCounterMode(display=False)),
    "another device": (lambda each: each.to("meta"), nullcontext),
}


@pytest.mark.parametrize("where", TORCHS_OWN)
def test_torch_makes_the_product_where(where: str, made: Made) -> None:
    convert, context = TORCHS_OWN[where]
    rows, weight = convert(several(3, 4)), convert(several(5, 4))
    with torch.no_grad(), context():
        found = products.linear(rows, weight)
    assert not made and found.shape == (3, 5) and found.dtype == rows.dtype


def test_torch_makes_the_product_where_it_is_small_or_the_processor_is_another(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, weight = several(3, 4), several(5, 4)
    with torch.no_grad():
        monkeypatch.setattr(products, "MANY", 3 * 4 * 5 + 1)
        products.linear(rows, weight)
        monkeypatch.setattr(products, "MANY", 3 * 4 * 5)
        monkeypatch.setattr(products, "SUITS", False)
        products.linear(rows, weight)
        monkeypatch.setattr(products, "SUITS", True)
        monkeypatch.setattr(products, "SOME", 4)
        products.linear(rows, weight)
        assert not made
        monkeypatch.setattr(products, "SOME", 3)
        products.linear(rows, weight)
    assert made == [(3, 5)]


def test_operations_are_counted_as_without() -> None:
    rows, weight = several(3, 4), several(5, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        products.linear(rows, weight)
    assert counter.get_total_flops() == 2 * 3 * 4 * 5


@pytest.mark.parametrize(
    ("described", "amd"), [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False), (None, True)]
)
def test_the_processor_is_asked_for(described: str | None, amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(*given: Any, **options: Any) -> str:
        if described is None:
            raise FileNotFoundError
        return described

    monkeypatch.setattr("pathlib.Path.read_text", read_text)
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD")
    assert products._on_amd() is amd


# kernels whose products oneDNN makes

Case = tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]], int]


def scaled(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, inner, outer, weight, bias, A, B: kernel(
        x, weight, bias, kernels.ScaledFactors(A, inner, B, outer)
    )


def low_rank(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, A, B, weight, bias: kernel(x, weight, bias, A, B, 0.7)


def rotated(kernel: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda x, R, weight, bias: kernel(x, weight, bias, R, **options)


def turned(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, entries, weight, bias: kernel(x, weight, bias, kernels.plain_cayley(entries, 2))


LAYER = [(6, 8), (6,)]
CASES: dict[str, Case] = {
    "low rank": (
        low_rank(kernels.low_rank_linear),
        low_rank(kernels.plain_low_rank_linear),
        [(2, 5, 8), (3, 8), (6, 3), *LAYER],
        3,
    ),
    "many ranks": (
        low_rank(kernels.low_rank_linear),
        low_rank(kernels.plain_low_rank_linear),
        [(2, 5, 8), (70, 8), (6, 70), *LAYER],
        3,
    ),
    "scaled": (
        scaled(kernels.scaled_low_rank_linear),
        scaled(kernels.plain_scaled_low_rank_linear),
        [(2, 5, 8), (70,), (6,), *LAYER, (70, 8), (6, 70)],
        3,
    ),
    "turned weight": (
        turned(kernels.rotated_linear),
        turned(kernels.plain_rotated_linear),
        [(2, 5, 8), (4, 1), *LAYER],
        2,
    ),
    "turned weight, few rows": (
        turned(kernels.rotated_linear),
        turned(kernels.plain_rotated_linear),
        [(2, 8), (4, 1), *LAYER],
        2,
    ),
    "turned anyhow": (
        rotated(kernels.rotated_linear, exact=False),
        rotated(kernels.plain_rotated_linear),
        [(2, 5, 8), (4, 2, 2), *LAYER],
        2,
    ),
    "turned anyhow, few rows": (
        rotated(kernels.rotated_linear, exact=False),
        rotated(kernels.plain_rotated_linear),
        [(2, 8), (4, 2, 2), *LAYER],
        2,
    ),
}
"""The kernel, its plain form, shapes of what they are given, and how many of those train."""


def tensors(shapes: list[tuple[int, ...]], trained: int) -> Iterator[Tensor]:
    for number, shape in enumerate(shapes):
        yield (several(*shape) * 0.3).requires_grad_(number < trained)


@pytest.mark.parametrize("case", CASES)
def test_kernels_with_products_by_onednn(case: str, made: Made) -> None:
    kernel, plain, shapes, trained = CASES[case]
    given = list(tensors(shapes, trained))
    precise = [each.detach().double().requires_grad_(each.requires_grad) for each in given]
    found, expected = kernel(*given), plain(*precise)
    assert made, "forward goes that way"
    gradient = torch.randn_like(expected)
    made.clear()
    of_found = torch.autograd.grad(found, given[:trained], gradient.float())
    assert made, "and backward"
    of_expected = torch.autograd.grad(expected, precise[:trained], gradient)
    torch.testing.assert_close([found, *of_found], [each.float() for each in (expected, *of_expected)])


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_gradients_go_by_torch(case: str, made: Made) -> None:
    kernel, plain, shapes, trained = CASES[case]
    given = list(tensors(shapes, trained))
    precise = [each.detach().double().requires_grad_(each.requires_grad) for each in given]
    found = []
    for run, tensors_of in ((kernel, given), (plain, precise)):
        wanted = tensors_of[:trained]
        first = torch.autograd.grad(run(*tensors_of).square().sum(), wanted, create_graph=True)
        found.append([each.float() for each in torch.autograd.grad(sum(each.sin().sum() for each in first), wanted)])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


def test_a_shared_projection_by_onednn(made: Made) -> None:
    x, A = several(2, 5, 8), several(3, 8)
    given = x.requires_grad_() * 1
    found = kernels.projected(given, A, torch.float32)
    (of_x,) = torch.autograd.grad(found.square().sum(), x)
    assert made == [(10, 3), (10, 8)]
    torch.testing.assert_close(found, x @ A.T)
    torch.testing.assert_close(of_x, 2 * x @ A.T @ A)


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("vera", {}), ("oft", {}), ("oft", {"series": 5})])
def test_with_and_without_gradients_all_is_the_same_to_the_bit(
    method: str, options: dict[str, Any], made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcore.layers.layer.SMALL", 0)
    model = nn.Sequential(
        nn.Linear(704, 512), nn.Linear(512, 704)
    )  # sums so long that two libraries round them differently
    stir(peftcore.apply(model, method, target=["0", "1"], **options))
    expected, x = model.train()(given := several(50, 704)), given.clone().requires_grad_()
    assert {(50, 512), (50, 704)} <= set(made), "both layers go that way"
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(given), expected), "a checkpoint's first forward has no gradients, and its second has"
