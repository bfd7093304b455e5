"""One forward, watched: attentions are found by their arithmetic, and the model is as it was afterwards."""

import pytest
import torch
import torch.nn.functional as F
from core_toys import perceptron, token_ids, transformer
from torch import Tensor, nn

from peftcore.roles.recording import comes_from, differentiable, product_factors, record


class ByHand(nn.Module):
    """Two products and a softmax between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.baddbmm(x.new_zeros(()), self.q(x), self.k(x).transpose(1, 2), alpha=0.5)
        return F.softmax(scores.masked_fill(scores > 9, 0.0), -1) @ self.v(x)


@pytest.mark.parametrize("fused", [True, False])
def test_operands_of_an_attention_are_what_its_matrices_gave(fused: bool) -> None:
    model, inputs = (transformer(1), (token_ids(),)) if fused else (ByHand(), (torch.randn(2, 3, 4),))
    matrices = {path for path, module in model.named_modules() if path.endswith(("q", "k", "v", "q_proj", "k_proj"))}
    with differentiable(model):
        recording = record(model, inputs, frozenset(matrices), frozenset())
        (event,) = recording.attentions
        assert set(event.operands) == {"q", "k", "v"} and set(event.outputs) == matrices
        named = {path.rpartition(".")[2][0]: output.value for path, output in event.outputs.items()}
        assert all(comes_from(event.operands[letter], value) for letter, value in named.items())
        assert not comes_from(event.operands["q"], named["k"])


def test_modules_are_noted_in_the_order_of_their_first_call() -> None:
    model = perceptron()
    first = record(model, {"x": torch.randn(2, 4)}, frozenset(), frozenset({"second"})).first_call
    assert sorted(first, key=first.__getitem__) == ["", "first", "second"]


def test_what_a_down_matrix_was_given() -> None:
    recording = record(perceptron(), (torch.randn(2, 4),), frozenset({"first"}), frozenset({"second"}))
    (down,) = recording.downs
    assert down.path == "second"
    assert torch.equal(down.value, down.outputs["first"].value.relu())


def test_no_hook_stays_even_when_the_forward_fails() -> None:
    model = perceptron()
    with pytest.raises(RuntimeError):
        record(model, (torch.randn(2, 5),), frozenset(), frozenset())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_flags_are_put_back() -> None:
    model = perceptron().train()
    model.second.eval()
    model.first.weight.requires_grad_(False)
    with torch.no_grad(), differentiable(model):
        assert torch.is_grad_enabled() and not model.training and model.first.weight.requires_grad
    assert model.training and not model.second.training
    assert not model.first.weight.requires_grad and model.first.bias.requires_grad


def test_a_product_however_it_is_written() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    ways = [
        (torch.matmul, (a, b), {}),
        (torch.bmm, (a,), {"mat2": b}),
        (torch.baddbmm, (torch.zeros(()), a, b), {}),
        (torch.einsum, ("bij,bjk->bik", a, b), {}),
        (torch.einsum, ("bij,bjk->bik", [a, b]), {}),
    ]
    for function, args, kwargs in ways:
        factors = product_factors(function, args, kwargs)
        assert factors is not None and factors[0] is a and factors[1] is b
    assert product_factors(torch.add, (a, a), {}) is None
