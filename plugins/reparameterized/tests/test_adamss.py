"""AdaMSS beside peft's and beside its equation; its clusters beside scikit-learn's, and how they are dropped."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, hosted, logical
from peft_pairs import ADAPTER, GRADIENTS, MERGED, MOVED, OUTPUTS, difference
from torch import Tensor, nn
from torch.func import functional_call
from two_layers import Two

import peftcore
from peftcore.errors import ConfigError, TrainingError
from peftcore.testing import against, conformance
from peftcore_reparameterized.adamss.clusters import approximate, clustered

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
SIZES = {"components": 5, "subspaces": 3, "rank": 2}


ROUNDED = "outputs of rounded weights are in other clusters, where the kit's noise is another adapter"
SCHEDULE: dict[str, Any] = {"target_subspaces": 4, "warmup": 0, "until": 3, "interval": 1}
CLUSTERED = ("mlp", "llama", "bert", "t5", "moe", "mistral", "vit")
FAILURES = {f"low_precision_hosts_keep_their_dtype-{host}": ROUNDED for host in CLUSTERED}


@conformance("adamss", options={"*": SCHEDULE}, expected_failures=FAILURES)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@conformance(
    "adamss",
    hosts=["mlp"],
    options={"mlp": SIZES},
    expected_failures={"steps_count_where_they_are_asked_for-mlp": "without target_subspaces steps change nothing"},
)
def test_conformance_without_a_schedule(check: Callable[[], None]) -> None:
    check()


@torch.no_grad()
def noisy(injection: peftcore.Injection) -> None:
    for parameter in injection.parameters():
        parameter.normal_(0, 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """Output by output, with the bias as one more column."""
    base, x = hosted(kind)
    host, injection, operator = adapted(kind, "adamss", **SIZES)
    torch.manual_seed(3)
    noisy(injection)
    copies = {name: p.detach().clone().requires_grad_() for name, p in operator.named_parameters()}
    weight, biased = logical(kind, base), kind not in ("wide", "embedding", "experts")
    W = weight.flatten(operator.layer.batch_dims + 1)
    columns = [W, base.layer.bias.unsqueeze(-1)] if biased else [W]
    whole = torch.cat(columns, -1).detach()
    batch = whole.shape[:-2]
    rows = []
    for at in torch.cartesian_prod(*(torch.arange(n) for n in whole.shape[:-1])).view(-1, len(batch) + 1).tolist():
        index, out = tuple(at[:-1]), at[-1]
        cluster = operator.cluster[(*index, out)]
        own = int(operator.ranks[(*index, cluster)])
        change = copies["B"][(*index, out)][:own] @ copies["A"][(*index, cluster)][:own] @ operator.V[index]
        rows.append(whole[(*index, out)] + change)
    new = torch.stack(rows).view(whole.shape)
    stored = new[..., : W.shape[-1]].reshape(weight.shape)
    tensors = {KINDS[kind].tensor: stored.T if KINDS[kind].transposed else stored}
    if biased:
        tensors["layer.bias"] = new[..., -1]
    ours, expected = host(x), functional_call(base, tensors, (x,))
    assert difference(ours, base(x)) >= MOVED
    assert difference(ours, expected) <= 1e-10
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for name, copy in copies.items():
        assert copy.grad.abs().max() > 0
        assert difference(operator.get_parameter(name).grad, copy.grad) <= 1e-10
    injection.bake()
    assert all(difference(host.get_parameter(name), value) <= 1e-10 for name, value in tensors.items())


@pytest.mark.parametrize("kind", KINDS)
def test_start(kind: str) -> None:
    """The base to the bit; V' of the weight with its bias, A of the rows of U in a cluster."""
    host, _, operator = adapted(kind, "adamss", **SIZES)
    base, x = hosted(kind)
    assert torch.equal(host(x), base(x))
    if kind == "experts":
        return
    weight = logical(kind, base).flatten(1)
    bias = getattr(base.layer, "bias", None)
    whole = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)
    V = torch.linalg.svd(whole, full_matrices=False).Vh
    assert (operator.V[0] @ V[0]).abs() > 0.99  # the first is found best
    assert difference(operator.V @ operator.V.T, torch.eye(len(operator.V)).double()) <= 1e-5
    U, _ = approximate(whole, len(operator.V), 0)
    for cluster, own in enumerate(operator.ranks.tolist()):
        rows = U[operator.cluster == cluster].double()
        assert own == min(2, len(rows))
        values = torch.linalg.eigh(rows.T @ rows).eigenvalues.flip(0)
        A = operator.A[cluster, :own]
        assert difference(A @ rows.T @ rows @ A.T, torch.diag(values[:own])) <= 1e-5
        assert not operator.A[cluster, own:].any()


def test_clusters_are_those_of_scikit_learn() -> None:
    """With its seed, also where a cluster comes out empty on the way."""
    cluster = pytest.importorskip("sklearn.cluster")
    for seed, (rows, count, width) in enumerate([(20, 3, 5), (200, 10, 16), (64, 32, 8), (300, 5, 40), (12, 12, 3)]):
        torch.manual_seed(seed)
        points = (torch.randn(rows, width) * torch.rand(width)).round(decimals=1 if rows == 64 else 5)
        means = cluster.KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
        assert clustered(points, count).tolist() == means.fit_predict(points.numpy()).tolist()


def test_ranks_by_singular_values() -> None:
    """A threshold leaves fewer; what is beyond them neither acts nor trains."""
    host, injection, operator = adapted("linear", "adamss", **{**SIZES, "rank": 4, "threshold": 0.5})
    U, _ = approximate(torch.cat([host.layer.weight, host.layer.bias[:, None]], 1).detach(), 5, 0)
    for cluster, own in enumerate(operator.ranks.tolist()):
        values = torch.linalg.svdvals(U[operator.cluster == cluster]) ** 2
        assert own == min(4, int((values > 0.5 * values[0]).sum()))
    assert operator.ranks.min() < 4
    noisy(injection)
    x = hosted("linear")[1]
    host(x).square().sum().backward()
    beyond = torch.arange(4) >= operator.ranks[:, None]
    assert not operator.A.grad[beyond].any() and not operator.B.grad[beyond[operator.cluster]].any()
    before = host(x).detach()
    with torch.no_grad():
        operator.A[beyond] += 1.0
    assert torch.equal(host(x), before)


def two() -> Two:
    """With a bias and without."""
    return Two(nn.Linear(12, 20), nn.Linear(20, 16, bias=False))


PEFTS = {"components": "r", "subspaces": "num_subspaces", "rank": "subspace_rank"}


def both(**more: Any) -> tuple[nn.Module, peftcore.Injection, peft.PeftModel, nn.Module]:
    """Ours, theirs with our tensors, and the base."""
    torch.manual_seed(0)
    base = two().double()
    config = peft.AdamssConfig(target_modules=["first", "second"], **{PEFTS[k]: v for k, v in SIZES.items()}, **more)
    theirs = peft.get_peft_model(deepcopy(base), config)
    ours = deepcopy(base)
    options = {} if not more else {"target_subspaces": 3, "warmup": 2, "until": 8, "interval": 2}
    target = ["first", "second"]
    injection = peftcore.apply(ours, "adamss", target=target, dtype="float64", **SIZES, **options)
    return ours, injection, theirs, base


def parts(operator: Any, value: Tensor, name: str) -> list[Tensor]:
    """The part of each cluster, of A or B, up to its rank."""
    return [
        value[c, :own] if name == "A" else value[operator.cluster == c, :own]
        for c, own in enumerate(operator.ranks.tolist())
    ]


def layers(injection: peftcore.Injection, theirs: peft.PeftModel) -> list[tuple[Any, Any]]:
    return [(each, theirs.base_model.model.get_submodule(path)) for path, each in injection.operators.items()]


@torch.no_grad()
def same_tensors(injection: peftcore.Injection, theirs: peft.PeftModel) -> None:
    for operator, layer in layers(injection, theirs):
        assert difference(operator.V, layer.adamss_newB[ADAPTER]) <= 1e-6
        for name in "AB":
            values = parts(operator, operator.get_parameter(name).normal_(0, 0.1), name)
            held = getattr(layer, f"adamss_{name}")[ADAPTER]
            for mine, other in zip(values, held, strict=True):
                other.copy_(mine)


@against("peft 0.21", "adamss")
def test_beside_peft() -> None:
    """Outputs, gradients, merged weights and biases, and as many parameters."""
    ours, injection, theirs, base = both()
    same_tensors(injection, theirs)
    count = sum(p.numel() for p in injection.parameters())
    assert count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count == 2 * (3 * 5 + 20) + 2 * (3 * 5 + 16)
    x = torch.randn(2, 3, 12).double()
    outputs = [model.train()(x) for model in (ours, theirs)]
    assert difference(outputs[0], base(x)) > MOVED and difference(*outputs) <= OUTPUTS
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        (output * direction).sum().backward()
    for operator, layer in layers(injection, theirs):
        for name in "AB":
            mine = parts(operator, operator.get_parameter(name).grad, name)
            for own, other in zip(mine, getattr(layer, f"adamss_{name}")[ADAPTER], strict=True):
                assert other.grad.abs().max() > 0 and difference(own, other.grad) <= GRADIENTS
    injection.bake()
    merged = dict(theirs.merge_and_unload().named_parameters())
    assert merged.keys() == dict(ours.named_parameters()).keys()
    for name, value in ours.named_parameters():
        assert difference(value, merged[name]) <= MERGED
    assert difference(ours.first.bias, base.first.bias) > MOVED


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@against("peft 0.21", "adamss")
def test_dropping_beside_peft(optimizer: type[torch.optim.Optimizer]) -> None:
    """Step by step: which clusters train, and all values; momentum and weight decay move what was dropped no more."""
    more = {"use_asa": True, "asa_target_subspaces": 3, "init_warmup": 2, "final_warmup": 8, "mask_interval": 2}
    ours, injection, theirs, _ = both(**more)
    same_tensors(injection, theirs)
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    if optimizer is torch.optim.SGD:
        settings["momentum"] = 0.9
    mine = injection.optimizer(optimizer, total_steps=12, **settings)
    other = optimizer([p for p in theirs.parameters() if p.requires_grad], **settings)
    active = []
    for step in range(12):
        torch.manual_seed(step)
        x = torch.randn(5, 12).double()
        for model, each in ((ours, mine), (theirs, other)):
            each.zero_grad()
            model(x).square().sum().backward()
            each.step()
        theirs.base_model.update_and_allocate(step)
        active.append(sum(int(operator.active.sum()) for operator in injection.operators.values()))
        for operator, layer in layers(injection, theirs):
            trains = [each.requires_grad for each in layer.adamss_A[ADAPTER]]
            assert trains == operator.active.tolist()
            for name in "AB":
                own = parts(operator, operator.get_parameter(name), name)
                for value, held in zip(own, getattr(layer, f"adamss_{name}")[ADAPTER], strict=True):
                    assert difference(value, held) <= 1e-8
    assert active == [6] * 4 + [2] * 8  # at step 4 the target is 3, and what is above the third score goes on


def test_schedules_that_do_not_fit() -> None:
    model = two()
    with pytest.raises(ConfigError, match="must be below until=50"):
        peftcore.apply(model, "adamss", target=["first"], target_subspaces=2, until=50)
    injection = peftcore.apply(model, "adamss", target=["first"], target_subspaces=2, until=9, warmup=0)
    with pytest.raises(TrainingError, match="until=9 is not reached in 9 steps"):
        injection.optimizer(torch.optim.SGD, lr=0.1, total_steps=9)


def test_without_a_target_nobody_counts_steps() -> None:
    model, x = two(), torch.randn(5, 12)
    injection = peftcore.apply(model, "adamss", target=["first"])
    assert not [name for name, _ in injection.operators["first"].named_buffers() if "importance" in name]
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    assert injection.operators["first"].B.any()
