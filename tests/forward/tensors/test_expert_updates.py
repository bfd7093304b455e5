"""What stands for a weight that a module reads, and for its low-rank updates: products with it make no sum of both."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore import activate
from peftcore.forward.plan.plan import ActivePlan
from peftcore.forward.state.slot import Slot
from peftcore.forward.tensors.expert_updates import LowRankUpdatedWeight

EXPERTS, OUT, IN, TOKENS = 3, 6, 4, 7
Ways = dict[str, Callable[[Tensor, Any], Tensor]]
Reads = Callable[[Tensor, Any], Tensor]


class Stack(nn.Module):
    """Outputs of all experts, of parameters that it takes apart as it is told."""

    def __init__(self, reads: Reads, transposed: bool = False) -> None:
        super().__init__()
        shape = (EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN)
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(shape))
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        return self.reads(x, self.weight)


class Host(nn.Module):
    def __init__(self, reads: Reads, transposed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(IN, IN)
        self.experts = Stack(reads, transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.first(x))


def by_experts(product: Callable[[Tensor, Any], Tensor]) -> Reads:
    return lambda x, weight: torch.stack([product(x, weight[expert]) for expert in range(EXPERTS)])


def routed(x: Tensor, weight: Any) -> Tensor:
    """As transformers picks the matrix of each token."""
    ids = torch.arange(EXPERTS).repeat_interleave(len(x))
    rows = x.repeat(EXPERTS, 1)
    return torch.bmm(weight[ids], rows.unsqueeze(-1)).squeeze(-1).view(EXPERTS, len(x), -1)


PRODUCTS: Ways = {
    "linear of each": by_experts(F.linear),
    "linear with a bias": lambda x, w: torch.stack([F.linear(x, w[e], x.new_ones(OUT)) - 1 for e in range(EXPERTS)]),
    "picked by tensors": lambda x, w: torch.stack([F.linear(x, w[torch.tensor(e)]) for e in range(EXPERTS)]),
    "picked by negative numbers": lambda x, w: torch.stack([F.linear(x, w[e]) for e in range(-EXPERTS, 0)]),
    "iterated": lambda x, weight: torch.stack([x @ each.T for each in weight]),
    "unbound": lambda x, weight: torch.stack([x.matmul(each.t()) for each in weight.unbind()]),
    "from the left": by_experts(lambda x, each: (each @ x.T).T),
    "all at once": lambda x, weight: x @ weight.mT,
    "batched": lambda x, weight: torch.bmm(x.expand(EXPERTS, -1, -1), weight.transpose(1, 2)),
    "batched, from the left": lambda x, weight: weight.bmm(x.T.expand(EXPERTS, -1, -1)).transpose(-2, -1),
    "by rows": routed,
}
STORED_TRANSPOSED: Ways = {
    "all at once": lambda x, weight: torch.matmul(x, weight),
    "mm": lambda x, weight: torch.stack([torch.mm(x, weight[e]) for e in range(EXPERTS)]),
}
OTHERS: Ways = {
    "sums": lambda x, weight: x @ (weight + 0.0).mT,
    "einsum": lambda x, weight: torch.einsum("ti,eoi->eto", x, weight),
    "vectors": lambda x, weight: torch.stack([torch.stack([each @ row for row in x]) for each in weight]),
    "all dimensions turned": lambda x, weight: torch.stack([x @ each for each in weight.permute(2, 1, 0).unbind(-1)]),
    "slices": lambda x, weight: x @ weight[:, :, :].mT,
    "names": lambda x, weight: torch.bmm(input=x.expand(EXPERTS, -1, -1), mat2=weight.mT),
    "a mask": lambda x, weight: x @ weight[torch.ones(EXPERTS, dtype=torch.bool)].mT,
    "a truth": lambda x, weight: x @ weight[torch.tensor(True)][0].mT,
    "changed in place": lambda x, weight: x @ weight.mul_(1.0).mT,
}


def adapted(
    reads: Reads, transposed: bool = False, method: str = "lora", **options: Any
) -> tuple[Host, peftcore.Injection]:
    torch.manual_seed(0)
    model = Host(reads, transposed).double()
    options = {"rank": 2, "alpha": 3.0, **options} if method == "lora" else options
    injection = peftcore.apply(model, method, target="experts.weight", dtype="float64", **options)
    filled(injection)
    return model, injection


def filled(injection: peftcore.Injection) -> None:
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.3)


def inputs() -> Tensor:
    return torch.linspace(-1, 1, TOKENS * IN, dtype=torch.float64).view(TOKENS, IN).requires_grad_()


def equation(model: Host, x: Tensor, *injections: peftcore.Injection) -> Tensor:
    """All experts' outputs [experts, tokens, out], written out."""
    weight: Tensor = model.experts.weight
    weight = weight.mT if model.experts.is_transposed else weight
    for injection in injections:
        A, B, scale = injection.operators["experts"].factors()
        weight = weight + scale * torch.einsum("eor,eri->eoi", B, A)
    return torch.einsum("ti,eoi->eto", model.first(x), weight)


def differentiated(output: Tensor, x: Tensor, *injections: peftcore.Injection) -> list[Tensor]:
    trained = [parameter for injection in injections for parameter in injection.parameters()]
    return [output, *torch.autograd.grad((output * torch.linspace(0, 1, OUT)).square().sum(), [x, *trained])]


class Sizes(TorchDispatchMode):
    """Notes who makes what is as large as the weight, views and copies apart (torch's matmul copies a base's, too)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and sorted(result.shape) == sorted((EXPERTS, OUT, IN)):
            memory = [each.untyped_storage()._cdata for each in (result, *args) if type(each) in (Tensor, nn.Parameter)]
            if memory[0] not in memory[1:] and func is not torch.ops.aten.clone.default:
                self.found.append(str(func))
        return result


def makes_no_sum(run: Callable[[], object]) -> bool:
    with Sizes() as sizes:
        run()
    return not sizes.found


CASES = [(way, False) for way in PRODUCTS] + [(way, True) for way in STORED_TRANSPOSED]


@pytest.mark.parametrize(("way", "transposed"), CASES)
def test_products_are_those_of_the_equation_and_make_no_sum(way: str, transposed: bool) -> None:
    model, injection = adapted((STORED_TRANSPOSED if transposed else PRODUCTS)[way], transposed)
    x = inputs()
    expected = differentiated(equation(model, x, injection), x, injection)
    found = differentiated(model(x), x, injection)
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    if way != "by rows":  # which copies a matrix for each token, here of the weight's size and more
        assert makes_no_sum(lambda: differentiated(model(x), x, injection))
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected[0], rtol=1e-12, atol=1e-12)
            assert makes_no_sum(lambda: model(x))


@pytest.mark.parametrize("way", OTHERS)
def test_anything_else_is_done_with_the_effective_tensor(way: str) -> None:
    model, injection = adapted(OTHERS[way])
    x = inputs()
    expected = differentiated(equation(model, x, injection), x, injection)
    for one, other in zip(differentiated(model(x), x, injection), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected[0], rtol=1e-12, atol=1e-12)
    assert not makes_no_sum(lambda: model(x))


def test_what_a_module_changes_in_place_all_later_products_see() -> None:
    def reads(x: Tensor, weight: Any) -> Tensor:
        before = x @ weight.mT
        with torch.no_grad():
            weight.mul_(2)
        return before + x @ weight.mT

    model, injection = adapted(reads)
    x = inputs()
    torch.testing.assert_close(model(x), 3 * equation(model, x, injection))


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func)
        return func(*args, **(kwargs or {}))


def test_gradients_of_experts_one_by_one_are_put_together_once() -> None:
    """That of a picked matrix is one of all, zero but for it: with as many additions as experts they grow as the square
    of their number."""
    model, injection = adapted(PRODUCTS["linear of each"])
    output = model(inputs())
    with Calls() as calls:
        torch.autograd.grad(output.square().sum(), list(injection.parameters()))
    assert torch.ops.aten.stack.default in calls.found
    assert torch.ops.aten.select_backward.default not in calls.found


def test_products_that_are_written_where_they_are_told() -> None:
    out = torch.empty(EXPERTS, TOKENS, OUT, dtype=torch.float64)
    model, injection = adapted(lambda x, weight: torch.bmm(x.expand(EXPERTS, -1, -1), weight.mT, out=out))
    x = inputs()
    with torch.no_grad():
        assert model(x) is out
        torch.testing.assert_close(out, equation(model, x, injection), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["linear of each", "batched", "einsum"])
def test_several_injections(way: str) -> None:
    model, one = adapted((PRODUCTS | OTHERS)[way])
    two = peftcore.apply(
        model, "lora", name="two", target="experts.weight", rank=3, alpha=1.5, scaling="sqrt_rank", dtype="float64"
    )
    filled(two)
    x = inputs()
    with activate(model, "lora", "two"):
        found = differentiated(model(x), x, one, two)
    for each, other in zip(found, differentiated(equation(model, x, one, two), x, one, two), strict=True):
        torch.testing.assert_close(each, other, rtol=1e-12, atol=1e-12)
    with activate(model):
        torch.testing.assert_close(model(x), equation(model, x))


def test_a_base_that_trains_gets_its_gradient() -> None:
    for way in ("linear of each", "batched", "einsum"):
        model, injection = adapted((PRODUCTS | OTHERS)[way])
        model.experts.weight.requires_grad_()
        x = inputs()
        found, expected = (
            torch.autograd.grad(output.square().sum(), model.experts.weight)
            for output in (model(x), equation(model, x, injection))
        )
        torch.testing.assert_close(found, expected)


class Twice(torch.autograd.Function):
    """A product with a gradient of its own, as fused kernels have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        return (2 * gradient @ weight).sum(0), 2 * gradient.mT @ x


class Pointing(Twice):
    """As kernels do that read memory by its address."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        values = (weight.data_ptr(), weight.stride())
        assert values[0] and values[1] == (OUT * IN, IN, 1)
        return 2 * x @ torch.from_numpy(weight.detach().numpy()).mT


@pytest.mark.parametrize("function", [Twice, Pointing])
def test_functions_with_a_gradient_of_their_own(function: Any) -> None:
    model, injection = adapted(lambda x, weight: function.apply(x, weight))
    x = inputs()
    expected = differentiated(2 * equation(model, x, injection), x, injection)
    for one, other in zip(differentiated(model(x), x, injection), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_is_called_from_elsewhere_than_python_sees_numbers_too() -> None:
    scripted = torch.jit.script(_summed)
    model, injection = adapted(lambda x, weight: scripted(x, weight))
    x = inputs()
    expected = differentiated(equation(model, x, injection).sum(0), x, injection)
    for one, other in zip(differentiated(model(x), x, injection), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _summed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(x, weight.transpose(1, 2)).sum(0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_below_checkpoints_and_autocast(reentrant: bool) -> None:
    model, injection = adapted(PRODUCTS["linear of each"])
    x = inputs()
    expected = differentiated(model(x), x, injection)[2:]
    checkpoint(model, x, use_reentrant=reentrant).mul(torch.linspace(0, 1, OUT)).square().sum().backward()
    for one, parameter in zip(expected, injection.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, one)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert output.dtype is torch.bfloat16 and makes_no_sum(lambda: model(x))
    torch.testing.assert_close(output.double(), equation(model, x, injection), rtol=0.05, atol=0.1)
    assert all(gradient.any() for gradient in torch.autograd.grad(output.sum(), list(injection.parameters())))


def test_frozen_factors_let_the_inputs_gradient_through() -> None:
    for way in ("linear of each", "batched", "einsum"):
        model, injection = adapted((PRODUCTS | OTHERS)[way])
        for parameter in injection.parameters():
            parameter.requires_grad_(False)
        x = inputs()
        found, expected = (
            torch.autograd.grad(output.square().sum(), x)[0] for output in (model(x), equation(model, x, injection))
        )
        torch.testing.assert_close(found, expected)


def test_it_looks_like_the_tensor_for_which_it_stands() -> None:
    seen: list[Any] = []

    def reads(x: Tensor, weight: Any) -> Tensor:
        seen.append(weight)
        shapes = tuple(weight.shape), tuple(weight.size()), weight.dim(), weight.ndim, len(weight), weight.numel()
        assert shapes == ((EXPERTS, OUT, IN),) * 2 + (3, 3, EXPERTS, EXPERTS * OUT * IN)
        assert weight.dtype is x.dtype and weight.device == x.device and weight.is_floating_point()
        with pytest.raises(IndexError):
            weight[EXPERTS]
        return x @ weight.mT

    model, _ = adapted(reads)
    model(inputs())
    (lazy_weight,) = seen
    assert type(lazy_weight) is LowRankUpdatedWeight and lazy_weight.parts.whole.tensor is None
    assert lazy_weight.requires_grad and lazy_weight.sum().requires_grad


def test_in_a_block_what_no_input_changes_is_kept_and_nothing_of_the_weights_size() -> None:
    model, injection = adapted(PRODUCTS["batched"])
    model.eval()
    slot: Slot = vars(model.experts)["_peftcore_slot"]
    calls: list[Any] = []
    operator = injection.operators["experts"]
    factors = operator.factors
    operator.factors = lambda: calls.append(None) or factors()
    x = inputs().detach()
    with torch.no_grad(), peftcore.cache_weights(model):
        for _ in range(3):
            first = model(x)
        assert len(calls) == 1 and slot.cache is not None and len(slot.cache) == 1
        with torch.inference_mode():
            assert torch.equal(model(x), first)
        operator.A.mul_(2)
        assert not torch.equal(model(x), first)
        torch.testing.assert_close(model(x), equation(model, x, injection))


def test_in_a_block_an_effective_tensor_that_is_wanted_is_kept() -> None:
    model, injection = adapted(OTHERS["einsum"])
    model.eval()
    x = inputs().detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), equation(model, x, injection))
    with torch.no_grad(), peftcore.cache_weights(model):
        first = model(x)
        assert makes_no_sum(lambda: model(x))
        injection.operators["experts"].A.mul_(2)
        second = model(x)
        assert not torch.equal(first, second)
        torch.testing.assert_close(second, equation(model, x, injection))
        injection.low_memory = True
        assert not makes_no_sum(lambda: model(x))


@pytest.mark.parametrize("method", ["dora", "ia3", "oft"])
def test_other_methods_have_no_stand_in(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivePlan, "lazy_weights", None)
    model, injection = adapted(PRODUCTS["batched"], method=method)
    x = inputs()
    assert all(gradient.any() for gradient in differentiated(model(x), x, injection))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize(
    ("rank", "target"), [(3, r"re:.*experts\.(gate_up|down)_proj"), (4, ["experts.up", "experts.gate", "experts.down"])]
)
def test_the_ways_in_which_transformers_runs_experts(
    implementation: str, rank: int, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_experts=4, num_experts_per_tok=2, vocab_size=11, experts_implementation=implementation,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    injection = peftcore.apply(model, "lora", target=target, rank=rank)
    filled(injection)
    ids = torch.arange(10).view(2, 5)

    def found() -> list[Tensor]:
        output = model(input_ids=ids, labels=ids)
        with torch.no_grad():
            again = model(input_ids=ids).logits
        return [output.logits, again, *torch.autograd.grad(output.loss, list(injection.parameters()))]

    made: list[object] = []
    effective = LowRankUpdatedWeight.effective
    monkeypatch.setattr(LowRankUpdatedWeight, "effective", lambda self: made.append(None) or effective(self))
    beside = found()
    grouped = implementation != "grouped_mm" or "_grouped_mm" in vars(torch)
    assert bool(made) is not grouped
    monkeypatch.setattr(ActivePlan, "factors", lambda self, module: None)
    injection.low_memory = True  # what is kept goes
    for one, other in zip(beside, found(), strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
