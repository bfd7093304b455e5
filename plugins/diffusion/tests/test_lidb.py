"""LiDB: numbers of an unofficial implementation (`numbers/lidb.json`: MFaceTech/HyperDreamBooth at 25a4312; the
authors published none), the equation a second time in float64 on all kinds of layers, the bases, where they come from
when an adapter is loaded, and the relaxed rank."""

import json
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from equation_in_float64 import KINDS, One, adapted, assert_equation, experts, fill
from peft_pairs import difference
from safetensors import safe_open
from torch import Tensor, nn

import peftcore
from peftcore.testing import HOSTS, conformance, frozen

NUMBERS = Path(__file__).parent / "numbers" / "lidb.json"
SCRIPT = run_path(str(NUMBERS.with_suffix(".py")))
RANK, ALPHA = 2, 3.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "a": 4, "b": 3}


@conformance("lidb", options={"*": {"a": 6, "b": 5}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("rank", SCRIPT["RANKS"])
def test_numbers_of_an_unofficial_implementation(rank: int) -> None:
    """Outputs, gradients of what trains and of what comes in, the LoRA that it is, and what is merged."""
    numbers = {name: torch.tensor(value).double() for name, value in frozen(NUMBERS)[str(rank)].items()}
    given, sizes = SCRIPT["tensors"](rank), {"a": SCRIPT["A"], "b": SCRIPT["B"], "alpha": SCRIPT["ALPHA"]}
    base = nn.Linear(SCRIPT["INPUTS"], SCRIPT["OUTPUTS"]).double()
    host = One(base).requires_grad_(False).train()
    weight, bias = base.weight.clone(), base.bias.clone()
    injection = peftcore.apply(host, "lidb", target="layer", rank=rank, dtype="float64", **sizes)
    operator: Any = injection.operators["layer"]
    with torch.no_grad():
        for name, tensor in {**given, **numbers}.items():
            if name in ("A", "B", "A_aux", "B_aux"):
                getattr(operator, name).copy_(tensor)
    x = given["x"].requires_grad_()
    y = host(x)
    update = y - nn.functional.linear(x, weight, bias)
    gradients = torch.autograd.grad((update * given["direction"]).sum(), (x, operator.A, operator.B))
    assert numbers["output"].abs().max() > 0.01
    assert difference(update, numbers["output"]) <= 1e-6
    for name, found in zip(("grad_x", "grad_A", "grad_B"), gradients, strict=True):
        assert difference(found.flatten(), numbers[name].flatten()) <= 1e-6, name
    A, B, scale = operator.factors()
    assert scale == SCRIPT["ALPHA"] / rank
    assert difference(A, numbers["down"]) <= 1e-6
    assert difference(B, numbers["up"]) <= 1e-6
    injection.merge()
    assert difference(host.layer.weight - weight, scale * numbers["up"] @ numbers["down"]) <= 1e-6


def in_bases(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """All four matrices, entry by entry of the update."""
    A_aux = tensors["A_aux"].reshape(len(tensors["A_aux"]), -1)
    update = torch.einsum("ob,br,ra,ai->oi", tensors["B_aux"], tensors["B"], tensors["A"], A_aux)
    return weight + ALPHA / RANK * update.view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    assert_equation(kind, "lidb", in_bases, **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_orthonormal_and_all_others_for_each_expert(kind: str) -> None:
    operator, found = adapted(kind, "lidb", **OPTIONS)[2], []
    assert {name for name, _ in operator.named_parameters()} == {"A", "B"}
    assert not operator.B.any()
    for _, tensors in experts(kind, operator):
        A_aux, B_aux = tensors["A_aux"].flatten(1), tensors["B_aux"]
        assert A_aux.shape[0] == 4 and B_aux.shape[1] == 3
        assert difference(A_aux @ A_aux.T, torch.eye(4).double()) <= 1e-6
        assert difference(B_aux.T @ B_aux, torch.eye(3).double()) <= 1e-6
        found.append(A_aux)
    assert all(difference(one, other) > 0.1 for n, one in enumerate(found) for other in found[:n])


def test_A_starts_as_wide_as_in_the_unofficial_code() -> None:
    """Xavier's deviation for [rank, a], and no update."""
    host = One(nn.Linear(400, 300))
    operator: Any = peftcore.apply(host, "lidb", target="layer", rank=100, a=300, seed=0).operators["layer"]
    assert operator.A.shape == (50, 300)
    assert operator.A.std().item() == pytest.approx(nn.init.xavier_normal_(torch.empty(50, 300)).std().item(), rel=0.03)


def test_narrow_layers_have_whole_bases() -> None:
    """And the rank that is left there; the scale stays that of the option."""
    operator = adapted("linear", "lidb", rank=64, alpha=1.0)[2]
    assert (operator.A.shape, operator.B.shape) == ((7, 12), (7, 7))
    assert operator.factors()[2] == 1 / 64


def pair() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()


def filled(model: nn.Module, **options: Any) -> peftcore.Injection:
    """An adapter of both layers with N(0, 0.1) in all that trains."""
    injection = peftcore.apply(model, "lidb", target=["*0", "*1"], dtype="float64", **OPTIONS | options)
    for operator in injection.operators.values():
        fill(operator)
    return injection


@pytest.mark.parametrize("stored", [False, True])
def test_bases_are_drawn_again_from_the_seed_or_stored(stored: bool, tmp_path: Path) -> None:
    """Whatever else is random, and also where the adapted model is a part of another one; each site has its own."""
    host, x = pair(), torch.randn(4, 6).double()
    injection = filled(host, basis_seed=5, store_basis=stored)
    first, second = injection.operators.values()
    assert difference(first.get_buffer("A_aux"), second.get_buffer("A_aux")) > 0.1
    injection.save(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter.safetensors", "pt") as file:
        names = {name.rpartition(".")[2] for name in list(file.keys())}
    assert names == ({"A", "B", "A_aux", "B_aux"} if stored else {"A", "B"})
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text())["config"]["basis_seed"] == 5
    for other in (pair(), nn.ModuleDict({"inside": pair(), "head": nn.Linear(6, 2)})):
        torch.manual_seed(1)
        peftcore.load(other, tmp_path / "adapter")
        found = other["inside"] if isinstance(other, nn.ModuleDict) else other
        assert torch.equal(found(x), host(x))


def test_bases_have_the_signs_that_leave_one_solution() -> None:
    """What was drawn is, in its basis, a triangle with a positive diagonal; torch alone leaves the signs open."""
    operator = adapted("linear", "lidb", **OPTIONS)[2]
    drawn = torch.empty(12, 4).double().normal_(generator=torch.Generator().manual_seed(0))
    R = operator.A_aux @ drawn
    assert R.diagonal().min() > 0.1 and R.tril(-1).abs().max() <= 1e-6


def test_another_seed_gives_other_bases() -> None:
    drawn = [adapted("linear", "lidb", **OPTIONS, basis_seed=seed)[2].B_aux for seed in (5, 6)]
    assert difference(*drawn) > 0.1


def test_order_of_targets_changes_no_basis() -> None:
    found = [peftcore.apply(pair(), "lidb", target=target, **OPTIONS) for target in (["0", "1"], ["1", "0"])]
    one, other = (each.operators for each in found)
    assert all(torch.equal(one[path].get_buffer("A_aux"), other[path].get_buffer("A_aux")) for path in ("0", "1"))


@pytest.mark.parametrize("baked", [False, True])
def test_rank_is_relaxed_by_a_lora_beside_it(baked: bool) -> None:
    """Nothing changes at first; then the update has the ranks of both, and LiDB stays as it was."""
    host = pair()
    base, x = host[0].weight.clone(), torch.randn(20, 6).double()
    injection = filled(host, rank=1)
    before = [parameter.clone() for parameter in injection.parameters()]
    y = host(x)
    if baked:
        injection.bake()
    else:
        injection.trainable(False)
    relaxed = peftcore.apply(host, "lora", rank=2, target=["0", "1"], dtype="float64")
    assert difference(host(x), y) <= 1e-10
    optimizer = torch.optim.SGD(relaxed.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        host(x).square().mean().backward()
        optimizer.step()
    if not baked:
        assert all(torch.equal(*each) for each in zip(injection.parameters(), before, strict=True))
        injection.merge()
    relaxed.merge()
    update = host[0].weight.detach() - base
    singular = torch.linalg.svdvals(update)
    assert singular[2] > 1e-4 * singular[0] and singular[3] < 1e-10 * singular[0]


def test_numbers_in_the_unet_of_stable_diffusion() -> None:
    """Of version 1.5: 150 for each of the 128 projections of attention."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    assert peftcore.plan(unet, "lidb").trainable == 128 * 150 == 19_200


def test_it_acts_in_a_unet_and_starts_as_the_base() -> None:
    model, inputs = HOSTS["unet"].build()
    base = model.eval()(**inputs).sample
    injection = peftcore.apply(model, "lidb", a=6, b=5)
    assert torch.equal(model(**inputs).sample, base)
    for operator in injection.operators.values():
        fill(operator)
    assert difference(model(**inputs).sample, base) > 1e-3


def test_the_scale_is_one_at_every_rank() -> None:
    for rank in (1, 3):
        model = nn.Sequential(nn.Linear(9, 7))
        (operator,) = peftcore.apply(model, "lidb", target="0", rank=rank).operators.values()
        assert operator.scale == 1.0
