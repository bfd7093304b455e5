"""The schemes in plain torch beside bitsandbytes' (0.50, on a CPU), to the bit, and what they keep in memory."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import peftcore
from peftcore.errors import QuantizationError
from peftcore.injection.quantization import scheme
from peftcore_quantized.backends import reference

SIZES = [(1024, 1024), (1000, 1001), (129, 65), (3, 7), (64, 100)]
ALL = [("nf4", {}), ("nf4", {"double_quant": True}), ("nf4-icq", {"tau_steps": 2}), ("int8", {}), ("int4", {})]
SCHEMES = pytest.mark.parametrize(("name", "options"), ALL, ids=["nf4", "nf4-double", "nf4-icq", "int8", "int4"])


def test_levels_are_those_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(reference.NORMAL), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(torch.tensor(reference.DYNAMIC), bnb.create_dynamic_map())


def assert_same_nf4(weight: Tensor, block_size: int, double_quant: bool) -> None:
    """Codes, scales, and what they stand for."""
    codes, state = bnb.quantize_4bit(weight, None, None, block_size, double_quant, "nf4")
    ours: Any = scheme("nf4", block_size=block_size, double_quant=double_quant).module(weight)
    assert torch.equal(ours.codes, codes.view(-1))
    if double_quant:
        assert torch.equal(ours.absmax_codes, state.absmax)
        assert torch.equal(ours.absmax_scale, state.state2.absmax)
        assert torch.equal(ours.absmax_mean, state.offset)
    else:
        assert torch.equal(ours.absmax, state.absmax)
    with torch.compiler.set_stance("force_eager"):  # it compiles for odd shapes
        assert torch.equal(ours.weight, bnb.dequantize_4bit(codes, state))
    assert ours.weight.dtype == weight.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [64, 128])
def test_nf4_is_that_of_bitsandbytes(block_size: int, double_quant: bool, dtype: torch.dtype) -> None:
    """Sizes that are no multiple of the block and odd ones among them; normal, uniform, heavy-tailed; zeros."""
    for seed, size in enumerate(SIZES):
        torch.manual_seed(seed)
        normal = torch.randn(size)
        for weight in [0.02 * normal, normal**3, torch.rand(size) - 0.3][: 1 if seed < 2 else 3]:
            weight[: size[0] // 3] *= torch.rand(size[0] // 3, 1)
            weight[-1] = 0
            weight[size[0] // 2, : size[1] // 2] = 1e-39 if dtype == torch.float32 else 0  # made zero in bfloat16
            assert_same_nf4(weight.to(dtype), block_size, double_quant)
    assert_same_nf4(torch.zeros(64, 64, dtype=dtype), block_size, double_quant)
    assert_same_nf4(torch.randint(-8, 9, (512, 512)).to(dtype), block_size, double_quant)  # many ties


def test_int8_is_that_of_bitsandbytes() -> None:
    for seed, size in enumerate(SIZES):
        torch.manual_seed(seed)
        weight = 0.02 * torch.randn(size)
        weight[-1] = 0
        codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
        ours: Any = scheme("int8").module(weight)
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.scale.view(-1), absmax / 127)
        assert torch.allclose(ours.weight, bnb.int8_vectorwise_dequant(codes, absmax), rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_int4_is_its_equation(group: int) -> None:
    """Sixteen steps from the least of a group to the largest; each value goes to the nearest."""
    torch.manual_seed(0)
    weight = torch.randn(48, 192)
    weight[0] = 0.25
    module: Any = scheme("int4", group_size=group).module(weight)
    groups = weight.double().view(48, -1, group)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    steps = torch.linspace(0, 1, 16, dtype=torch.float64)
    levels = low + (high - low) * steps  # [out, groups, 16]
    expected = levels.gather(2, (groups.unsqueeze(3) - levels.unsqueeze(2)).abs().argmin(3))
    assert (module.weight - expected.view(48, 192)).abs().max() <= 1e-6
    assert module.codes.numel() == weight.numel() // 2
    with pytest.raises(QuantizationError, match="divisible"):
        scheme("int4", group_size=group).module(weight[:, :100])


def host(width: int = 192) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, width), nn.Tanh(), nn.Linear(width, 256))


@contextmanager
def watched(saved: list[tuple[int, ...]]) -> Iterator[None]:
    """Note the shapes of what autograd keeps, of floating point and as large as the half of a weight or more."""

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() >= 192 * 256 / 2:
            saved.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield


def large() -> list[tuple[int, ...]]:
    """The shapes of what there is of floating point and as large as the half of a weight or more."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return [tuple(t.shape) for t in found if t.is_floating_point() and t.untyped_storage().nbytes() >= 2 * 192 * 256]


METHODS = [None, "lora", "dora", "oft", "qlora", "loftq"]


def adapted(method: str | None, name: str, options: dict[str, Any]) -> nn.Module:
    model = peftcore.quantize(host(), name, **options)
    if method is not None:
        peftcore.apply(model, method, target=["0", "2"])
    return model


@SCHEMES
@pytest.mark.parametrize("method", METHODS)
def test_no_dense_copy_is_kept_for_backward(method: str | None, name: str, options: dict[str, Any]) -> None:
    x = torch.randn(3, 256, requires_grad=True)
    with watched(saved := []):
        host()(x)
    assert len(saved) == 2, "the dense host keeps its weights"
    model = adapted(method, name, options)
    with watched(saved := []):
        y = model(x)
    assert not saved
    y.sum().backward()
    assert x.grad.abs().max() > 0


def test_no_dense_copy_outlives_a_pass() -> None:
    """After forward, after backward, and after a pass in evaluation."""
    x, before = torch.randn(3, 256), large()
    models = [adapted(method, name, options) for method in METHODS for name, options in ALL]
    outputs = [model(x) for model in models]
    assert large() == before
    for output in outputs:
        if output.requires_grad:
            output.sum().backward()
    assert large() == before
    with torch.no_grad():
        outputs = [model.eval()(x) for model in models]
    assert large() == before


@SCHEMES
def test_gradient_is_that_of_the_dense_weight(name: str, options: dict[str, Any]) -> None:
    packed, x = peftcore.quantize(host(), name, **options), torch.randn(3, 256, requires_grad=True)
    dense = host()
    for index in (0, 2):
        dense[index].weight.data = packed[index].weight
    ours, theirs = packed(x), dense(x)
    assert torch.equal(ours, theirs)
    direction = torch.randn_like(ours)
    (got,) = torch.autograd.grad(ours, x, direction)
    (expected,) = torch.autograd.grad(theirs, x, direction)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@SCHEMES
def test_copies_and_files(name: str, options: dict[str, Any]) -> None:
    """Copies compute the same; the state fits a module that was packed from another weight."""
    model, x = peftcore.quantize(host(), name, **options), torch.randn(3, 256)
    expected = model(x)
    for how, make in COPIES.items():
        assert torch.equal(make(model)(x), expected), how
    other = host()
    nn.init.normal_(other[0].weight)
    peftcore.quantize(other, name, **options)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)


@SCHEMES
def test_casts_leave_what_is_packed_alone(name: str, options: dict[str, Any]) -> None:
    """A host in bfloat16, from before or from after packing: it computes in bfloat16 with scales in float32."""
    for model in (
        peftcore.quantize(host().bfloat16(), name, **options),
        peftcore.quantize(host(), name, **options).bfloat16(),
    ):
        x = torch.randn(3, 256, dtype=torch.bfloat16, requires_grad=True)
        y = model(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16
        assert {t.dtype for t in model[0].buffers() if t.is_floating_point()} == {torch.float32}
        peftcore.apply(model, "lora", target=["0", "2"]).merge(into="float")
        assert model(x).dtype == model[0].weight.dtype == torch.bfloat16
    plain, cast = (peftcore.quantize(host(), name, **options) for _ in range(2))
    cast.bfloat16().float()
    assert torch.equal(cast[0].weight, plain[0].weight)
    assert peftcore.quantize(host(), name, **options).to("meta")[0].weight.is_meta


@SCHEMES
def test_compiled(name: str, options: dict[str, Any]) -> None:
    """As one graph, with gradients."""
    torch._dynamo.reset()
    model, x = peftcore.quantize(host(), name, **options), torch.randn(3, 256, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    (got,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.allclose(compiled(x), model(x), rtol=0, atol=1e-6)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
