"""AdaLoRA: its start, its loss, and how its budget falls. Its numbers beside peft's, step by step, are in the
repository's side-by-side tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import TrainingError, UnsupportedSite
from peftcore.testing import conformance
from peftcore.testing.hosts import HOSTS

SITES = 3


@conformance("adalora", options={"mlp": {"rank": 9}})  # at rank 12 its factors have the shapes of weights there
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Stack(nn.Module):
    """Linear maps of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(6 + i, 7 + i) for i in range(SITES))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.maps:
            x = torch.tanh(linear(x))
        return x


def adapted(**options: Any) -> tuple[nn.Module, peftcore.Injection, list[Any]]:
    model = Stack().double()
    injection = peftcore.apply(
        model, "adalora", target="maps.*", dtype="float64", **{"rank": 4, "target_rank": 2, **options}
    )
    return model, injection, list(injection.operators.values())


def train(model: nn.Module, injection: peftcore.Injection, total: int, until: int | None = None) -> list[int]:
    """Ranks of all sites together after each step."""
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1, total_steps=total)
    ranks = []
    for _ in range(until or total):
        optimizer.zero_grad()
        model(torch.randn(5, 6).double()).square().sum().backward()
        optimizer.step()
        ranks.append(sum(int(operator.E.count_nonzero()) for operator in injection.operators.values()))
    return ranks


def test_start() -> None:
    """E is zero, so nothing changes; A and B are N(0, 0.02)."""
    linear = nn.Sequential(nn.Linear(400, 300))
    (operator,) = peftcore.apply(linear, "adalora", rank=50, target_rank=20, target="0").operators.values()
    assert not operator.E.any()
    for factor in (operator.A, operator.B):
        assert factor.mean().abs() < 0.001
        assert factor.std().item() == pytest.approx(0.02, rel=0.05)
    assert operator.scale == pytest.approx(8 / 50)


def test_equation() -> None:
    model, injection, operators = adapted(alpha=3.0)
    for parameter in injection.parameters():
        nn.init.normal_(parameter)
    linear, operator, x = model.maps[0], operators[0], torch.randn(2, 5, 6).double()
    update = 3.0 / (4 + 1e-5) * operator.B @ operator.E.diag() @ operator.A
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight + update, linear.bias))


def test_orthogonality_is_the_mean_distance_of_all_factors() -> None:
    _, injection, operators = adapted(orthogonality=0.3)
    distances = []
    for operator in operators:
        for rows in (operator.A, operator.B.T):
            nn.init.normal_(rows.data)
            distances.append((rows @ rows.T - torch.eye(4)).square().sum().sqrt())
    own = injection.method.aux_loss(injection)
    torch.testing.assert_close(own, 0.3 * sum(distances) / (2 * SITES))
    own.backward()
    assert all(operator.A.grad.any() and operator.E.grad is None for operator in operators)


def test_orthogonal_factors_cost_nothing_and_have_finite_gradients() -> None:
    _, injection, operators = adapted()
    for operator in operators:
        nn.init.orthogonal_(operator.A.data)
        nn.init.orthogonal_(operator.B.data)
    own = injection.method.aux_loss(injection)
    own.backward()
    assert own < 1e-9
    assert all(torch.isfinite(operator.A.grad).all() for operator in operators)


def test_the_loss_of_the_host_has_it_in_training() -> None:
    model, inputs = HOSTS["bert"].build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    labelled = {**inputs, "labels": torch.tensor([0, 2])}
    plain = model.eval()(**labelled).loss
    injection = peftcore.apply(model, "adalora")
    own = injection.method.aux_loss(injection)
    assert own > 0.1
    torch.testing.assert_close(model.train()(**labelled).loss, plain + own)
    torch.testing.assert_close(model.eval()(**labelled).loss, plain)
    with injection.disabled():
        torch.testing.assert_close(model.train()(**labelled).loss, plain)


def test_experts_count_each_by_itself() -> None:
    model, _ = HOSTS["moe"].build()
    path = "model.layers.0.mlp.experts.down_proj"
    injection = peftcore.apply(model, "adalora", target=path.replace("model.", "*."), rank=3, target_rank=1)
    operator = injection.operators[path]
    experts = len(model.get_parameter(path))
    assert operator.E.shape == (experts, 3)
    expected = []
    for A, B in zip(operator.A, operator.B, strict=True):
        expected += [torch.linalg.matrix_norm(A @ A.T - torch.eye(3)), torch.linalg.matrix_norm(B.T @ B - torch.eye(3))]
    torch.testing.assert_close(injection.method.aux_loss(injection), 0.5 * torch.stack(expected).mean())
    nn.init.normal_(operator.E)
    for parameter in operator.parameters():
        parameter.grad = torch.randn_like(parameter)
    for step in range(1, 5):
        injection.method.on_step(injection, step, 4)
    assert int(operator.E.count_nonzero()) == experts


def test_the_budget_falls_as_a_cubic_between_warmup_and_final() -> None:
    model, injection, _ = adapted(warmup=2, final=3)
    ranks = train(model, injection, total=12)
    expected = []
    for step in range(1, 13):
        left = min(max((9 - step) / (9 - 2), 0.0), 1.0) ** 3
        expected.append(12 if step <= 2 else int((12 - 6) * left + 6))
    assert ranks == expected
    assert ranks[-4:] == [6, 6, 6, 6]


def test_between_choices_triples_may_come_back() -> None:
    model, injection, _ = adapted(interval=3)
    ranks = train(model, injection, total=10)
    assert [rank < 12 for rank in ranks] == [False, False, True, False, False, True, False, False, True, True]


def test_what_was_chosen_last_stays_in_the_final_phase() -> None:
    model, injection, operators = adapted(final=4)
    train(model, injection, total=8, until=4)
    chosen = [operator.E != 0 for operator in operators]
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1, total_steps=8)
    optimizer.steps = 4
    for _ in range(4):
        model(torch.randn(5, 6).double()).square().sum().backward()
        optimizer.step()
        assert all(torch.equal(operator.E != 0, kept) for operator, kept in zip(operators, chosen, strict=True))


def test_the_least_important_triples_go_wherever_they_are() -> None:
    """The budget is one for all sites: a site without importance loses all of its triples."""
    _, injection, operators = adapted()
    for index, operator in enumerate(operators):
        for parameter in operator.parameters():
            nn.init.ones_(parameter)
            parameter.grad = torch.full_like(parameter, 0.0 if index == 1 else 1.0 + index)
        operator.E.grad *= torch.arange(1, 5)
    for step in (1, 2):
        injection.method.on_step(injection, step, 2)
    assert [int(operator.E.count_nonzero()) for operator in operators] == [2, 0, 4]
    assert operators[0].E.tolist() == [0, 0, 1, 1]


def test_a_target_at_the_start_drops_nothing() -> None:
    model, injection, _ = adapted(target_rank=4)
    assert train(model, injection, total=5) == [12] * 5


@pytest.mark.parametrize("options", [{"warmup": 5}, {"final": 5}, {"warmup": 3, "final": 2}])
def test_a_schedule_needs_steps(options: dict[str, int]) -> None:
    model, injection, _ = adapted(**options)
    with pytest.raises(TrainingError, match="leave none of the 5 steps for reducing ranks"):
        train(model, injection, total=5)


def test_files_hold_the_triples_alone(tmp_path: Any) -> None:
    """What a schedule needs between steps is the optimizer's to save."""
    model, injection, operators = adapted()
    train(model, injection, total=6, until=3)
    assert {key.rpartition(".")[2] for key in injection.state_dict()} == {"A", "B", "E"}
    injection.save(tmp_path)
    other = Stack().double()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "peft" not in key})
    peftcore.load(other, tmp_path)
    x = torch.randn(2, 6).double()
    assert torch.equal(other(x), model(x))
    assert any(operator.importance_A.any() for operator in operators)


def test_dropout_wants_an_input() -> None:
    with pytest.raises(UnsupportedSite, match="read, not called"):
        peftcore.apply(HOSTS["encoder"].build()[0], "adalora", target="attn.q", dropout=0.1)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.Linear(6, 4), 3 * (6 + 4 + 1)),
        (nn.Conv2d(4, 6, (3, 2), groups=2), 3 * (2 * 6 + 6 + 1)),
        (nn.Embedding(9, 5), 3 * (9 + 5 + 1)),
    ],
    ids=["linear", "grouped", "embedding"],
)
def test_number_of_parameters(layer: nn.Module, count: int) -> None:
    assert peftcore.plan(nn.Sequential(layer), "adalora", target="0", rank=3).trainable == count
    injection = peftcore.apply(nn.Sequential(layer), "adalora", target="0", rank=3)
    assert sum(parameter.numel() for parameter in injection.parameters()) == count
