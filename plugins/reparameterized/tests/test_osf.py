"""OSF beside peft's and beside its equation; whether gradients are orthogonal to what is kept."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, experts, hosted, logical
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from torch.func import functional_call

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance


# Where half of the singular values stay, both halves of a change have together the shapes of weights.
@conformance("osf", options={"*": {"effective_rank": 0.7}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """Found by the eigenvectors of W W', another algorithm; the projection of gradients is written a second time."""
    base, x = hosted(kind)
    host, _, operator = adapted(kind, "osf", effective_rank=2)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    copies = {name: p.detach().clone().requires_grad_() for name, p in operator.named_parameters()}
    effective, high = [], []
    for index, (W, _) in enumerate(experts(kind, operator)):
        own = {name: copy[index] if kind == "experts" else copy for name, copy in copies.items()}
        matrix = W.flatten(1)
        kept = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -2:]
        right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -2:]
        update = own["U"] @ torch.diag(own["S"]) @ own["V"]
        effective.append((kept @ kept.T @ matrix + update).view(W.shape))
        high.append((kept, right))
    weight = torch.stack(effective) if kind == "experts" else effective[0]
    name = "layer.stack" if kind == "experts" else "layer.weight"
    stored = weight if base.get_parameter(name).shape == logical(kind, base).shape else weight.T
    ours, expected = host(x), functional_call(base, {name: stored}, (x,))
    assert difference(ours, base(x)) > 1e-3
    assert difference(ours, expected) <= 1e-10
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    assert difference(operator.S.grad, copies["S"].grad) <= 1e-9
    kept, right = (torch.stack(each) if kind == "experts" else each[0] for each in zip(*high, strict=True))
    grad = copies["U"].grad
    assert difference(operator.U.grad, grad - kept @ (kept.mT @ grad)) <= 1e-9
    grad = copies["V"].grad
    assert difference(operator.V.grad, grad - (grad @ right) @ right.mT) <= 1e-9
    assert (kept.mT @ operator.U.grad).abs().max() <= 1e-9 * operator.U.grad.abs().max()


def test_start_is_the_base_to_the_bit() -> None:
    host, _, operator = adapted("linear", "osf")
    base, x = hosted("linear")
    assert operator.S.shape == (4,)  # of 7, 3 stay
    assert torch.equal(host(x), base(x))


class Three(nn.Module):
    """More inputs than outputs, fewer, and as many."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 7), nn.Linear(7, 9, bias=False), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


TARGET = ["first", "second", "third"]


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """With our decomposition, since peft's is in float32 and has other signs."""
    layer: Any = theirs.get_submodule(site.module_path)
    for each in "USV":
        held, mine = getattr(layer, f"_osf_{each}_low_init"), operator.get_buffer(f"{each}0")
        assert difference(held[ADAPTER].abs(), mine.abs()) <= 1e-3
        held[ADAPTER] = mine
        if each != "S" and ADAPTER in getattr(layer, f"_osf_{each}_high"):
            getattr(layer, f"_osf_{each}_high")[ADAPTER] = operator.get_buffer(f"kept_{each}")
    trained = layer.osf_svd_params[ADAPTER]
    for each in "USV":
        yield Pair(f"{site.path}.{each}", operator.get_parameter(each), trained[f"{each}_low"], lambda t: t)


@pytest.mark.parametrize("rank", [3, 0.4, None])
@against("peft 0.21", "osf")
def test_beside_peft(rank: Any) -> None:
    torch.manual_seed(0)
    config = peft.OSFConfig(effective_rank=rank, target_modules=TARGET)
    options = {"target": TARGET, "dtype": "float64", **({} if rank is None else {"effective_rank": rank})}
    both = Both(Three().double(), "osf", options, config, pairs)
    ours = sum(p.numel() for p in both.injection.parameters())
    assert ours == sum(p.numel() for p in both.tuner.model.parameters() if p.requires_grad)
    k = [int(side * rank) if isinstance(rank, float) else rank or side // 2 for side in (7, 7, 9)]
    assert ours == (7 - k[0]) * (12 + 7 + 1) + (7 - k[1]) * (7 + 9 + 1) + (9 - k[2]) * (9 + 9 + 1)
    x = torch.randn(2, 3, 12).double()
    for model in (both.ours, both.tuner):
        model.train()
    both.assert_same(lambda model: model(x))


def test_plain_descent_leaves_what_is_kept() -> None:
    """After steps of SGD, the kept directions still give what the base gives."""
    base, x = hosted("linear")
    host, injection, operator = adapted("linear", "osf", effective_rank=2)
    start = {name: p.detach().clone() for name, p in operator.named_parameters()}
    optimizer = injection.optimizer(torch.optim.SGD, lr=1e-2)
    for _ in range(5):
        host(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert difference(operator.U, start["U"]) > 1e-3
    before, after = logical("linear", base), operator.merged(logical("linear", base)).detach()
    assert difference(operator.kept_U.T @ after, operator.kept_U.T @ before) <= 1e-10
    assert difference(after @ operator.kept_V.T, before @ operator.kept_V.T) <= 1e-10


def test_refusals() -> None:
    for rank in (7, 0.1):
        with pytest.raises(UnsupportedSite, match="7 singular values"):
            peftcore.apply(hosted("linear")[0], "osf", target="layer", effective_rank=rank)
