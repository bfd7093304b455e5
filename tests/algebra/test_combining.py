"""Whole adapters as changes of weights: read off, written as LoRA, combined."""

import copy
from pathlib import Path
from typing import Any

import peft.utils.merge_utils as theirs
import pytest
import torch
from algebra_toys import F64, close, drawn
from core_toys import Perceptron
from torch import Tensor, nn

import peftcore
from peftcore.algebra import merge_math as algebra
from peftcore.errors import ConfigError, DuplicateInjection, MergeError, NotMergeable, UnknownInjection, UnsupportedSite
from peftcore.injection.injection import Injection
from peftcore.testing.kit import fill

BOTH = ["first", "second"]


def host() -> nn.Module:
    torch.manual_seed(0)
    return Perceptron().double().eval()


X = drawn(5, 4, seed=9)


def applied(model: nn.Module, method: Any, name: str, seed: int, **options: Any) -> Injection:
    injection = peftcore.apply(model, method, name=name, dtype="float64", **{"target": BOTH, **options})
    fill(injection, seed)
    return injection


@torch.no_grad()
def outputs(model: nn.Module, *names: str) -> Tensor:
    with peftcore.activate(model, *names):
        return model(X)


def test_cat_is_the_exact_sum_and_what_peft_calls_linear_is_not() -> None:
    model = host()
    base = outputs(model)
    a = applied(model, "lora", "a", 1, rank=2, alpha=3.0)
    b = applied(model, "lora", "b", 2, rank=3)
    ours, expected = peftcore.combine(model, {"a": 0.7, "b": -1.2}), {}
    assert list(peftcore.injections(model)) == ["a", "b", "combined"] and ours.active and not (a.active or b.active)
    for path, delta in peftcore.deltas(ours).items():
        expected[path] = 0.7 * peftcore.deltas(a)[path] - 1.2 * peftcore.deltas(b)[path]
        assert close(delta, expected[path])
    merged = copy.deepcopy(host())
    for path, delta in expected.items():
        merged.get_submodule(path).weight.data += delta
    assert close(outputs(model, "combined"), merged(X)) and not close(outputs(model, "combined"), base, 1e-2)

    A, B = (operator.factors() for operator in (a.operators["first"], b.operators["first"]))
    wide = nn.functional.pad(A[0], (0, 0, 0, 1)) * 0.7**0.5 + B[0] * 1.2**0.5  # peft wants equal ranks
    tall = nn.functional.pad(A[1] * A[2], (0, 1)) * 0.7**0.5 - B[1] * 1.2**0.5
    assert 0.5 < float((tall @ wide - expected["first"]).detach().norm() / expected["first"].norm()) < 2.0


def test_opposite_weights_cancel_and_a_soup_is_a_mean_of_parameters() -> None:
    model = host()
    base = outputs(model)
    a, b = (applied(model, "ia3", name, seed, target=["first"]) for seed, name in enumerate("ab"))
    twin = applied(model, "ia3", "twin", 0, target=["first"])
    soup = peftcore.combine(model, {"a": 0.25, "b": 0.75}, "linear", name="soup")
    gains = [each.operators["first"].gain for each in (a, b, soup)]
    assert soup.method.name == "ia3" and torch.equal(gains[2], 0.25 * gains[0] + 0.75 * gains[1])
    assert torch.equal(gains[0], twin.operators["first"].gain)
    for name, seed in (("plus", 3), ("minus", 3)):
        applied(model, "lora", name, seed)
    nothing = peftcore.combine(model, {"plus": 0.4, "minus": -0.4}, name="nothing")
    assert close(outputs(model, "nothing"), base) and nothing.config.rank == 16
    assert not close(outputs(model, "plus"), base, 1e-2)


def merged_by(how: str, taus: list[Tensor], g: torch.Generator) -> Tensor:
    return {
        "svd": lambda: 2 * taus[0] + taus[1],
        "ties": lambda: algebra.ties(taus, [2.0, 1.0], 0.6),
        "dare_linear": lambda: algebra.dare_linear(taus, [2.0, 1.0], 0.6, g),
        "dare_ties": lambda: algebra.dare_ties(taus, [2.0, 1.0], 0.6, g),
        "magnitude_prune": lambda: theirs.magnitude_prune(taus, torch.tensor([2.0, 1.0], dtype=F64), 0.6),
        "slerp": lambda: algebra.slerp(taus[0], taus[1], 1 / 3),
    }[how]()


@pytest.mark.parametrize("how", ["svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "slerp"])
def test_merges_of_unlike_adapters_are_those_of_their_changes(how: Any) -> None:
    model = host()
    a = peftcore.deltas(applied(model, "loha", "a", 1, rank=2))
    b = peftcore.deltas(applied(model, "lora", "b", 2, rank=2, target="second"))
    density = None if how in ("svd", "slerp") else 0.6
    result = peftcore.deltas(peftcore.combine(model, {"a": 2.0, "b": 1.0}, how, rank=6, density=density, seed=5))
    g = torch.Generator().manual_seed(5)
    for path, delta in result.items():
        taus = [a[path], b.get(path, torch.zeros_like(a[path]))]
        assert close(delta, merged_by(how, taus, g), 1e-9)


@pytest.mark.parametrize("method", ["hra", "loha", "ia3", "lora"])
@pytest.mark.parametrize("weight", [0.5, -1.0, 2.0])
def test_a_part_of_a_change_is_merged(method: str, weight: float) -> None:
    model = host()
    base = {name: each.clone() for name, each in model.state_dict().items()}
    source = applied(model, method, "source", 1, target=["first"])
    change = peftcore.deltas(source)
    source.merge("record", weight=weight)
    for path, delta in change.items():
        assert not delta.requires_grad
        key = path if path.endswith(".bias") else f"{path}.weight"
        assert close(model.state_dict()[key], base[key] + weight * delta)
    with source.disabled():
        assert torch.equal(model.first.weight, base["first.weight"])
    assert close(model.first.weight, base["first.weight"] + weight * change["first"])
    source.unmerge()
    source.remove()
    assert all(torch.equal(each, base[name]) for name, each in model.state_dict().items())


@pytest.mark.parametrize("method", ["hra", "loha", "ia3", "lora"])
def test_any_merged_change_becomes_a_lora(method: str) -> None:
    model = host()
    model.first.bias = None
    source = applied(model, method, "source", 1, target=["first"])
    expected, base = outputs(model, "source"), outputs(model)
    lora, errors = peftcore.to_lora(source, 8)
    assert close(outputs(model, "source_lora"), expected, 1e-10) and not close(expected, base, 1e-3)
    assert max(errors.values()) < 1e-10 and lora.active and not source.active
    small, errors = peftcore.to_lora(source, 1, name="small")
    change = peftcore.deltas(source)["first"]
    real = float((peftcore.deltas(small)["first"] - change).norm() / change.norm())
    assert abs(errors["first"] - real) < 1e-9 and real > 0.01


def test_a_lora_of_given_factors() -> None:
    """Of several ranks and scales; it stands in place of the adapter whose sites it has."""
    model = host()
    old = applied(model, "ia3", "old", 1)
    sites = {site.path: site for site in old.sites}
    ranks = {"first": (2, 0.5), "second": (1, -2.0)}
    factors = {
        path: (drawn(rank, sites[path].in_features), drawn(sites[path].out_features, rank), scale)
        for path, (rank, scale) in ranks.items()
    }
    lora = peftcore.lora_of(model, {path: (sites[path], each) for path, each in factors.items()}, "made", ["old"])
    assert lora.active and not old.active and not any(each.requires_grad for each in lora.parameters())
    for path, (A, B, scale) in factors.items():
        assert close(peftcore.deltas(lora)[path], scale * B @ A)
    with pytest.raises(DuplicateInjection):
        peftcore.lora_of(model, {"first": (sites["first"], factors["first"])}, "made")


def fills(lora: Injection, path: str, rank: int) -> bool:
    """Whether a LoRA has that rank at a site, and each of its ranks trains: a factor of it gets a gradient."""
    operator = lora.operators[path]
    of_A, of_B = operator.A.grad.flatten(1).norm(dim=1), operator.B.grad.norm(dim=0)
    return len(of_A) == rank and bool((of_A + of_B > 1e-3).all())


@pytest.mark.parametrize("method", ["lora", "attention_only"])
def test_ranks_that_a_change_does_not_need_add_nothing_and_train(method: str) -> None:
    """Of the factors of an adapter, and of a change whose other singular values are rounding."""
    model = host()
    model.first.bias = None
    source = applied(model, method, "source", 1, **({"rank": 1} if method == "lora" else {"target": ["first"]}))
    if method != "lora":
        with torch.no_grad():
            next(iter(source.parameters())).copy_(model.first.weight + drawn(6, 1) @ drawn(1, 4))
    change, expected = peftcore.deltas(source), outputs(model, "source")
    lora, errors = peftcore.to_lora(source, 4)
    assert close(outputs(model, "source_lora"), expected, 1e-12) and max(errors.values()) < 1e-12
    assert all(close(delta, change[path], 1e-12) for path, delta in peftcore.deltas(lora).items())
    lora.trainable(True)
    (model(X) ** 3).sum().backward()
    assert all(fills(lora, path, 4) for path in change)


def test_a_site_of_a_lower_rank_than_the_others_trains_at_all_ranks() -> None:
    model = host()
    applied(model, "lora", "a", 1, rank=3)
    applied(model, "lora", "b", 2, rank=2, target=["second"])
    both = peftcore.combine(model, {"a": 1.0, "b": 1.0})
    both.trainable(True)
    (model(X) ** 3).sum().backward()
    assert fills(both, "first", 5) and fills(both, "second", 5)

    words = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3)).double()
    source = applied(words, [{"method": "lora", "target": ["0"], "rank": 1}], "a", 1, target=None)
    lora, _ = peftcore.to_lora(source, 3)
    lora.trainable(True)
    words(torch.arange(6)).sum().backward()
    assert fills(lora, "0", 3)


def test_every_kind_of_weight_becomes_a_lora() -> None:
    """Rows of a fused projection that is stored the other way round, a table trained in place, a convolution."""
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=12)).double().eval()
    ids = torch.arange(6)[None]
    source = applied(
        model,
        [
            {"method": "lora", "target": "attn.q"},
            {"method": "loha", "target": ["mlp.c_fc", "attn.c_proj"]},
            {"method": "linear_probe", "target": ["wte"]},
        ],
        "a",
        1,
        target=None,
    )
    expected = model(ids).last_hidden_state.detach()
    lora, errors = peftcore.to_lora(source, 12)
    assert close(model(ids).last_hidden_state, expected, 1e-9) and len(errors) == 4 and lora.active

    conv = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    x = drawn(2, 4, 5, 5)
    source = applied(conv, "loha", "a", 1, target=["0"])
    expected = conv(x).detach()
    peftcore.to_lora(source, 6)
    assert close(conv(x), expected, 1e-9)


def test_saved_adapters_are_combined_and_leave_nothing_behind(tmp_path: Path) -> None:
    model = host()
    for seed, name in enumerate("ab"):
        injection = applied(model, "lora", name, seed)
        injection.save(tmp_path / name)
    expected = {path: delta * 0.5 + peftcore.deltas(peftcore.injections(model)["b"])[path] * 2
                for path, delta in peftcore.deltas(peftcore.injections(model)["a"]).items()}  # fmt: skip
    other = host()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    result = peftcore.combine(other, {str(tmp_path / "a"): 0.5, tmp_path / "b": 2.0})
    assert list(peftcore.injections(other)) == ["combined"]
    assert all(close(delta, expected[path]) for path, delta in peftcore.deltas(result).items())
    result.remove()
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_what_cannot_be_is_refused_with_its_reason(tmp_path: Path) -> None:
    model = host()
    ia3, lora = applied(model, "ia3", "ia3", 1), applied(model, "lora", "lora", 2)
    applied(model, "lora", "other", 3, alpha=2.0)
    bitfit = applied(model, "bitfit", "bitfit", 4)
    bottleneck = applied(model, "parallel_adapter", "bottleneck", 4, target=["first"])
    for source, named in ((ia3, "first.bias"), (bitfit, "second.bias")):
        with pytest.raises(UnsupportedSite, match=named):
            peftcore.to_lora(source, 2)
    with pytest.raises(NotMergeable, match="parallel_adapter"):
        peftcore.deltas(bottleneck)
    for wrong, options, message in (
        ({"lora": 1.0}, {"how": "svd"}, "needs rank"),
        ({"lora": 1.0}, {"how": "ties", "rank": 2}, "needs density"),
        ({"lora": 1.0}, {"rank": 2}, "no use for rank"),
        ({"lora": 1.0, "other": 1.0}, {"how": "linear"}, "differ in method or options"),
        ({"lora": 1.0}, {"how": "slerp", "rank": 2}, "slerp needs two adapters"),
        ({"lora": 1.0}, {"how": "mean", "rank": 2}, "is not one of"),
        ({}, {}, "needs adapters"),
    ):
        with pytest.raises(ConfigError, match=message):
            peftcore.combine(model, wrong, **options)  # type: ignore[arg-type]
    with pytest.raises(UnknownInjection, match="neither a folder nor"):
        peftcore.combine(model, {"nobody": 1.0})
    with pytest.warns(UserWarning, match="rank 1 loses"):
        peftcore.combine(model, {"lora": 1.0}, "svd", rank=1)
    bitfit.remove()
    for each in (bottleneck, ia3):
        each.remove()
    peftcore.activate(model, "lora")
    lora.merge()
    with pytest.raises(MergeError, match="unmerge"):
        peftcore.deltas(lora)
