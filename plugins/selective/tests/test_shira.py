"""SHiRA: the kit, the numbers of peft (which has the random mask on linear layers), and the mask by magnitude and the
convolutions, written a second time."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from peft_pairs import ADAPTER, Both, Pair
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS

RANK = 2
"""The widths of the tiny hosts allow no more."""


@conformance("shira", options={"*": {"rank": RANK}})
def test_shira(check: Callable[[], None]) -> None:
    check()


def filled(model: nn.Module, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, "shira", **{"rank": RANK, "target": "*", **options})
    for operator in injection.operators.values():
        nn.init.normal_(operator.values, std=0.1)
    return injection


def shira_pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """The values; peft's layer is given our entries, row by row as it keeps them."""
    layer: Any = theirs.get_submodule(site.module_path)
    rows, columns = operator.index.long() // site.in_features, operator.index.long() % site.in_features
    layer.shira_indices[ADAPTER] = torch.stack([rows, columns]).int()
    yield Pair(site.path, operator.values, layer.shira_weight[ADAPTER], lambda t: t)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("mask", ["random", "magnitude"])
@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "shira")
def test_numbers_of_peft(name: str, mask: str) -> None:
    model, inputs = HOSTS[name].build()
    names = ["q_proj", "v_proj"] if name == "llama" else ["query", "value"]
    config = peft.ShiraConfig(r=RANK, target_modules=names)
    both = Both(model.eval(), "shira", {"target": names, "rank": RANK, "mask": mask}, config, shira_pairs)
    both.assert_same(lambda adapted: HOSTS[name].output(adapted(**inputs)))


def test_entries_are_drawn_evenly_and_once() -> None:
    model = nn.Sequential(nn.Linear(9, 7, bias=False))
    counts = torch.zeros(63)
    for seed in range(400):
        index = peftcore.apply(model, "shira", rank=1, target="0", seed=seed, name=f"s{seed}").operators["0"].index
        assert len(index.unique()) == len(index) == 9 + 7
        counts[index.long()] += 1
        peftcore.injections(model)[f"s{seed}"].remove()
    expected, deviation = 400 * 16 / 63, (400 * 16 / 63 * 47 / 63) ** 0.5
    assert ((counts - expected).abs() < 5 * deviation).all()


class Zoo(nn.Module):
    """A grouped convolution, and experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 3, groups=2, padding=1)
        self.experts = nn.Parameter(torch.randn(3, 6, 9))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bihw,eoi->beohw", self.conv(x), self.experts[..., :6])


def test_magnitude_takes_the_largest_of_each_matrix() -> None:
    model = Zoo().double()
    operators = filled(model, mask="magnitude", target=["conv", "experts"], dtype="float64").operators
    conv, experts = operators["conv"], operators["experts"]
    assert conv.values.shape == (RANK * (4 * 9 + 6),)
    assert experts.values.shape == (3, RANK * (9 + 6))
    for index, weight in ((conv.index[None], model.conv.weight.flatten()[None]), (experts.index, model.experts)):
        for chosen, matrix in zip(index.tolist(), weight.flatten(1).tolist(), strict=True):
            assert chosen == sorted(sorted(range(len(matrix)), key=lambda i, m=matrix: -abs(m[i]))[: len(chosen)])


def test_the_update_written_a_second_time() -> None:
    """One entry after the other, for kernels and experts."""
    model, x = Zoo().double(), torch.randn(2, 8, 5, 5).double()
    weights = {"conv": model.conv.weight, "experts": model.experts}
    expected = {path: weight.detach().clone() for path, weight in weights.items()}
    before = model(x)
    operators = filled(model, target=["conv", "experts"], dtype="float64").operators
    for path, operator in operators.items():
        index, values = (
            each.reshape(-1, operator.index.shape[-1]).tolist() for each in (operator.index, operator.values)
        )
        matrices = expected[path].view(len(index), -1)
        for number, matrix in enumerate(matrices):
            for position, value in zip(index[number], values[number], strict=True):
                matrix[position] += value
    y = torch.nn.functional.conv2d(x, expected["conv"], model.conv.bias, padding=1, groups=2)
    result = torch.einsum("bihw,eoi->beohw", y, expected["experts"][..., :6])
    assert (model(x) - before).abs().max() > 0.1
    torch.testing.assert_close(model(x), result, rtol=0, atol=1e-12)


def test_entries_are_rounded_once() -> None:
    """On a bfloat16 host: the sum in float32, rounded; rounding the values first would give other numbers."""
    model = nn.Sequential(nn.Linear(9, 7, bias=False)).bfloat16()
    operator = filled(model, target="0").operators["0"]
    weight, index = model[0].weight.detach().flatten(), operator.index.long()
    exact, twice = weight.clone(), weight.clone()
    exact[index] = (weight[index].float() + operator.values).bfloat16()
    twice[index] += operator.values.bfloat16()
    assert torch.equal(operator(model[0].weight).flatten(), exact)
    assert not torch.equal(exact, twice)


def test_the_entries_travel_with_the_file(tmp_path: Any) -> None:
    first, x = nn.Sequential(nn.Linear(9, 7)), torch.randn(3, 9)
    injection = filled(first, target="0", seed=11)
    injection.save(tmp_path)
    second = nn.Sequential(nn.Linear(9, 7))
    second.load_state_dict({k: v for k, v in first.state_dict().items() if "peft" not in k})
    loaded = peftcore.load(second, tmp_path)
    assert torch.equal(loaded.operators["0"].index, injection.operators["0"].index)
    assert loaded.operators["0"].index.dtype == torch.int32
    assert torch.equal(second(x), first(x))


def test_more_entries_than_there_are() -> None:
    for do in (peftcore.plan, peftcore.apply):
        with pytest.raises(UnsupportedSite, match="63 entries, but rank=4 needs 64"):
            do(nn.Sequential(nn.Linear(9, 7)), "shira", target="0", rank=4)


def supertuning_pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """The values, in our order of entries, and the factors."""
    layer: Any = theirs.get_submodule(site.module_path)
    assert set(layer.supertuning_indices[ADAPTER].tolist()) == set(operator.index.tolist())
    layer.supertuning_indices[ADAPTER] = operator.index.clone()
    yield Pair(f"{site.path}.values", operator.values, layer.supertuning_values[ADAPTER], lambda t: t)
    if operator.scale:
        yield Pair(f"{site.path}.A", operator.A, layer.supertuning_lora_A[ADAPTER].weight, lambda t: t)
        yield Pair(f"{site.path}.B", operator.B, layer.supertuning_lora_B[ADAPTER].weight, lambda t: t)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("select_top", "rank"), [(True, None), (False, None), (True, 3)])
@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "shira")
def test_supertuning_of_peft(select_top: bool, rank: int | None, training: bool) -> None:
    """The same entries, outputs, gradients, merged weights, and as many parameters."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 9)).double().train(training)
    config = peft.SupertuningConfig(target_modules=["0", "2"], sparsity=0.7, select_top=select_top, r=rank)
    options = {"mask": "magnitude" if select_top else "smallest", "sparsity": 0.7, "dtype": "float64"}
    options |= {"low_rank": rank, "alpha": 2.0 * rank} if rank else {}
    both = Both(base, "shira", {"target": ["0", "2"], **options}, config, supertuning_pairs)
    count = int(84 * (1 - 0.7)) + int(63 * (1 - 0.7)) + (rank or 0) * (12 + 7 + 7 + 9)
    assert sum(p.numel() for p in both.injection.parameters()) == count
    assert sum(p.numel() for p in both.tuner.parameters() if p.requires_grad) == count
    x = torch.randn(5, 12).double()
    both.tuner.double()  # peft makes its tensors in float32
    both.assert_same(lambda model: model(x))


def test_the_low_rank_update_written_a_second_time() -> None:
    """For kernels of groups and experts."""
    model = Zoo().double()
    weights = {path: model.get_parameter(name).detach().clone() for path, name in
               (("conv", "conv.weight"), ("experts", "experts"))}  # fmt: skip
    options = {"mask": "magnitude", "sparsity": 0.9, "low_rank": 2, "alpha": 3.0, "dtype": "float64"}
    injection = peftcore.apply(model, "shira", target=["conv", "experts"], **options)
    for path, operator in injection.operators.items():
        A, B, before = operator.A, operator.B, weights[path]
        assert not B.any() and 0 < A.abs().max() <= 1
        nn.init.normal_(B)
        flat = A.reshape(*B.shape[:-2], 2, -1)
        torch.testing.assert_close(operator(before), before + 1.5 * (B @ flat).view(before.shape))


def test_a_sparsity_that_leaves_nothing() -> None:
    with pytest.raises(UnsupportedSite, match=r"63 entries, of which sparsity=0.99 leaves none"):
        peftcore.apply(nn.Sequential(nn.Linear(9, 7)), "supertuning", target="0")


@conformance("shira", hosts=["llama", "convnet"], options={"*": {"mask": "magnitude", "sparsity": 0.9, "low_rank": 2}})
def test_supertuning_with_a_low_rank_update(check: Callable[[], None]) -> None:
    check()
