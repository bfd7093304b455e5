"""A site that never ran is an error, unless it may rest."""

import copy
from collections.abc import Callable

import pytest
import torch
from core_toys import Shift, perceptron
from torch import Tensor, nn

import peftcore
from peftcore.errors import InactiveSite
from peftcore.forward.state.host_state import state_of


class ReadsWeight(nn.Module):
    """A vision attention as some write it: the fused projection is read, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv  # under a name of its own, by which no rule knows it
        q, k, v = nn.functional.linear(x, fused.weight, fused.bias).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Attention(nn.Module):
    """One whose projections can be made one, which reads their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)
        self.mlp = perceptron()
        self.fused: nn.Linear | None = None

    def fuse(self) -> None:
        self.fused = nn.Linear(4, 8)
        self.fused.weight.data = torch.cat([self.query.weight.data, self.value.weight.data])

    def forward(self, x: Tensor) -> Tensor:
        both = (self.query(x), self.value(x)) if self.fused is None else self.fused(x).chunk(2, -1)
        mixed: Tensor = both[0] + both[1] + self.mlp(x).sum(-1, keepdim=True)
        return mixed


class Stack(nn.Module):
    def __init__(self, part: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(part() for _ in range(depth))
        self.use = list(range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for index in self.use:
            x = self.layers[index](x)
        return x


def waits(model: nn.Module) -> bool:
    """Whether a site is expected to run, in the mode of the model."""
    state = state_of(model)
    return state is not None and state.watches_runs and bool(state.watched.waiting[model.training])


class FusedLoss(nn.Module):
    """Calls its head in evaluation; in training reads its weight, as losses do that make no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.auxiliary = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        if not self.training:
            return self.head(hidden)
        return nn.functional.linear(hidden, self.head.weight, self.head.bias) + self.auxiliary(hidden)


@pytest.mark.parametrize("first", [True, False], ids=["training", "evaluation"])
def test_a_head_that_is_called_in_evaluation_and_read_in_training(first: bool) -> None:
    model = FusedLoss().train(first)
    peftcore.apply(model, "lora", target="re:body|head", rank=2)
    if not first:
        model(torch.randn(2, 4))
    with pytest.raises(InactiveSite, match=r"1 adapted sites did not: head"):
        model.train()(torch.randn(2, 4))


def test_a_head_that_runs_in_training_alone_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = FusedLoss()
    peftcore.apply(model, "lora", target=["body", "auxiliary"], rank=2)
    model(torch.randn(2, 4))
    for _ in range(2):
        model.eval()(torch.randn(2, 4))
    assert [each.getMessage() for each in caplog.records] == [
        "1 adapted sites ran in training but not in evaluation: auxiliary"
    ]


def test_a_module_that_stays_in_evaluation_runs_in_training() -> None:
    model = perceptron().train()
    model.first.eval()
    peftcore.apply(model, "lora", target=["first", "second"], rank=2)
    model.first.eval()
    model(torch.randn(2, 4))
    model.eval()(torch.randn(2, 4))
    assert not waits(model)


def test_weight_that_is_read_raises_after_the_first_forward() -> None:
    model = Stack(ReadsWeight)
    peftcore.apply(model, "lora", target="qkv")
    with pytest.raises(InactiveSite, match=r"3 adapted sites did not: layers\.0\.qkv.*read"):
        model(torch.randn(2, 5, 4))


def test_witness_judges_every_injection_and_then_goes() -> None:
    model = Stack(ReadsWeight)
    peftcore.apply(model, "lora", target="proj")
    model(torch.randn(2, 5, 4))
    assert not waits(model)
    peftcore.apply(model, "lora", name="second", target="qkv")
    with pytest.raises(InactiveSite, match="qkv"):
        model(torch.randn(2, 5, 4))


def test_removed_injection_is_not_expected_any_more() -> None:
    model = Stack(ReadsWeight)
    peftcore.apply(model, "lora", target="qkv").remove()
    peftcore.apply(model, "lora", target="proj")
    model(torch.randn(2, 5, 4))


def test_removed_injection_leaves_nobody_waiting() -> None:
    model = Stack(ReadsWeight)
    peftcore.apply(model, "lora", target="proj")
    model(torch.randn(2, 5, 4))
    peftcore.apply(model, "lora", name="gone", target="qkv").remove()
    assert not waits(model)


def test_sites_are_judged_for_modules_and_for_train_alike_but_only_by_the_method() -> None:
    """A module that the user named in `train` may rest (a head for another task)."""
    model = perceptron()
    model.unused = nn.Linear(3, 2)
    peftcore.apply(model, "lora", target="first", train=["unused"])
    model(torch.randn(2, 4))
    peftcore.apply(model, "lora", name="again", target="unused")
    with pytest.raises(InactiveSite, match="unused"):
        model(torch.randn(2, 4))


def test_dropped_layers_are_exempt() -> None:
    model = Stack(lambda: nn.Sequential(nn.Linear(4, 4)))
    model.use = [1]
    peftcore.apply(model, "lora", target=nn.Linear)
    model(torch.randn(2, 4))
    model(torch.randn(2, 4))


class Mixture(nn.Module):
    """Experts as modules; the router sends every token to the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[2](x)


def test_experts_without_tokens_are_exempt() -> None:
    model = Stack(Mixture, depth=1)
    peftcore.apply(model, "lora", target=nn.Linear)
    model(torch.randn(2, 4))
    assert not waits(model)


def test_witness_waits_while_the_injection_does_not_act() -> None:
    model = Stack(ReadsWeight)
    injection = peftcore.apply(model, "lora", target="qkv")
    with injection.disabled():
        model(torch.randn(2, 5, 4))
    with pytest.raises(InactiveSite):
        model(torch.randn(2, 5, 4))


def test_modules_fused_before_the_first_forward() -> None:
    model = Stack(Attention)
    peftcore.apply(model, "lora", target=["query", "value"])
    for layer in model.layers:
        layer.fuse()
    with pytest.raises(InactiveSite, match=r"6 adapted sites did not: layers\.0\.query"):
        model(torch.randn(2, 5, 4))


def test_sites_are_looked_at_in_the_first_forward() -> None:
    model = Stack(Attention)
    peftcore.apply(model, "lora", target="query")
    state = state_of(model)
    assert state is not None and (watched := state.watched) is not None
    assert list(watched.new) == ["lora"] and not watched.sites
    again = copy.deepcopy(model)
    model(torch.randn(2, 5, 4))
    assert not waits(model) and len(watched.sites["lora"]) == 3
    assert waits(model.eval())
    model(torch.randn(2, 5, 4))
    assert not watched.new and not any(watched.waiting.values())
    again.use = []
    with pytest.raises(InactiveSite, match="3 adapted sites did not"):
        again(torch.randn(2, 5, 4))


@pytest.mark.parametrize("whole", [True, False])
def test_of_a_host_that_is_compiled_nothing_is_said(whole: bool) -> None:
    """Of one whose blocks are compiled, each by itself, it is: their marks come out."""
    torch.compiler.reset()
    model, x = Stack(Attention), torch.randn(2, 5, 4)
    peftcore.apply(model, "lora", target="query")
    if whole:
        torch.compile(model, backend="eager", fullgraph=True)(x)
    else:
        for layer in model.layers:
            layer.compile(backend="eager", fullgraph=True)
        model(x)
    state = state_of(model)
    assert state is not None and state.watches_runs != whole
    model(x)
    assert not waits(model)
    torch.compiler.reset()


def test_merged_injection_needs_no_forward() -> None:
    model = Stack(ReadsWeight)
    injection = peftcore.apply(model, Shift, target="qkv")
    x = torch.randn(2, 5, 4)
    injection.merge()
    model(x)


@pytest.mark.parametrize("recorded", [True, False])
def test_projections_that_are_fused_later_are_missed(recorded: bool) -> None:
    """With gradients and without."""
    model = Stack(Attention)
    peftcore.apply(model, "lora", target=["query", "mlp.first"])
    x = torch.randn(2, 4)
    with torch.set_grad_enabled(recorded):
        for _ in range(2):
            model(x)
        for layer in model.layers:
            layer.fuse()
        with pytest.raises(InactiveSite, match=r"3 adapted sites did not: layers\.0\.query"):
            model(x)


@pytest.mark.parametrize("copied", [False, True])
def test_a_single_fused_block_is_found_at_once(copied: bool) -> None:
    model = Stack(Attention)
    peftcore.apply(model, "lora", target="query")
    with torch.no_grad():
        model(torch.randn(2, 4))
        model = copy.deepcopy(model) if copied else model
        model.layers[1].fuse()
        with pytest.raises(InactiveSite, match=r"1 adapted sites did not: layers\.1\.query"):
            model(torch.randn(2, 4))
