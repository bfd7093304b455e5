"""FourierFT: the promises of the kit, peft's numbers from the same positions, the update as a sum of cosines in
float64, and where the positions come from."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import LACKING, LAYERS, assert_weight, copies, frozen, merged_experts
from one_layer import One
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import HOSTS, against, conformance
from peftcore.utils import notices
from peftcore_reparameterized.fourierft import relative_size

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
EXACT, N = 1e-12, 9


OPTIONS = {
    "*": {"n_frequency": N, "alpha": 8.0},  # narrow weights: larger updates for the same n
    "moe": {"alpha": 4.0},  # where no two of its experts are nearly tied in bfloat16
    "task": {"n_frequency": 100, "alpha": 32.0},  # less than by default: the hosts there are narrow, too
}


@conformance("fourierft", options=OPTIONS)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(site.path, operator.c, layer.fourierft_spectrum[ADAPTER], lambda t: t)


def both(base: nn.Module, target: list[str], seed: int, **options: Any) -> Both:
    config = peft.FourierFTConfig(
        target_modules=target, n_frequency=N, scaling=40.0, random_loc_seed=seed, init_weights=True, **options
    )
    ours = {"target": target, "n_frequency": N, "alpha": 40.0, "entry_seed": seed}
    return Both(base, "fourierft", ours, config, pairs)


@pytest.mark.parametrize("seed", [777, 5])
@pytest.mark.parametrize(
    "layer", [nn.Linear(12, 7), nn.Linear(12, 7, bias=False), Conv1D(7, 12)], ids=["linear", "no-bias", "conv1d"]
)
@against("peft 0.21", "fourierft")
def test_beside_peft(layer: nn.Module, seed: int) -> None:
    """Outputs, gradients and merged weights."""
    x, transposed = torch.randn(2, 3, 12), isinstance(layer, Conv1D)
    both(One(layer), ["layer"], seed, fan_in_fan_out=transposed).assert_same(lambda model: model(x))


@against("peft 0.21", "fourierft")
def test_a_model_beside_peft() -> None:
    model, inputs = HOSTS["llama"].build()
    both(model.eval(), ["q_proj", "v_proj"], 3).assert_same(lambda adapted: adapted(**inputs).logits)


def cosines(c: Tensor, entries: list[int], out: int, inputs: int) -> Tensor:
    """The update [out, in] for a factor of one, wave by wave."""
    p, q = torch.arange(out).double()[:, None], torch.arange(inputs).double()[None, :]
    waves = [torch.cos(2 * math.pi * (e // inputs * p / out + e % inputs * q / inputs)) for e in entries]
    return sum(value * wave for value, wave in zip(c, waves, strict=True)) / (out * inputs)


@pytest.mark.parametrize("name", ["linear", *LACKING])
def test_equation(name: str) -> None:
    base, x = frozen(*LAYERS[name])
    options = {"target": "layer", "n_frequency": N, "alpha": 40.0, "dtype": "float64"}
    injection = peftcore.apply(deepcopy(base), "fourierft", **options)
    (operator,) = injection.operators.values()
    nn.init.normal_(operator.c, std=0.1)
    tensors, swap = copies(operator), int(name in ("transposed", "embedding"))
    rows = base.layer.weight.transpose(0, swap)
    delta = 40 * cosines(tensors["c"], operator.entries.tolist(), *rows.flatten(1).shape)
    weight = (rows + delta.view(rows.shape)).transpose(0, swap)
    assert_weight(base, x, injection, weight, tensors, exact=EXACT, moved=0.01)


def test_experts_have_spectra_of_their_own() -> None:
    operator, experts = merged_experts("fourierft", lambda operator: None, n_frequency=N)
    for old, new, tensors in experts:
        assert difference(new, old) > 0.01
        assert difference(new, old + 150 * cosines(tensors["c"], operator.entries.tolist(), *old.shape)) <= EXACT


def test_positions_come_from_the_option_alone(tmp_path: Path) -> None:
    """Not from the seed of `apply`, which files do not keep; two sites of one shape have the same ones."""
    base, x = nn.Sequential(*(nn.Linear(*shape) for shape in ((8, 8), (8, 9), (9, 8), (8, 8)))), torch.randn(5, 8)
    model, options = deepcopy(base), {"target": ["0", "1", "3"], "n_frequency": N, "entry_seed": 4}
    injection = peftcore.apply(model, "fourierft", seed=9, **options)
    first, other, last = (operator.entries.tolist() for operator in injection.operators.values())
    assert first == last != other
    assert len(set(first)) == N
    assert not torch.equal(*(injection.operators[name].c for name in "03"))
    injection.save(tmp_path / "adapter")
    assert sum(tensor.numel() for tensor in injection.state_dict().values()) == 3 * N
    peftcore.load(base, tmp_path / "adapter")
    assert torch.equal(base(x), model(x))


def test_a_fresh_adapter_has_entries_of_the_wished_size() -> None:
    options = {"target": "layer", "n_frequency": 4000}
    for std in (1.0, 0.2):
        (operator,) = peftcore.apply(One(nn.Linear(80, 60)), "fourierft", init_std=std, **options).operators.values()
        assert operator.c.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("act", [peftcore.plan, peftcore.apply])
def test_more_entries_than_the_weight_has_are_refused(act: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedSite, match="layer has 84 entries in its spectrum, fewer than n_frequency=1000"):
        act(One(nn.Linear(12, 7)), "fourierft", target="layer")


def square(width: int, weights: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    nn.init.normal_(model[0].weight, std=weights)
    nn.init.normal_(model[1].weight, std=2 * weights)
    return model


def noticed(model: nn.Module, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    caplog.clear()
    notices.told.clear()
    peftcore.apply(model, "fourierft", target=["0", "1"], **options)
    return [message for message in caplog.messages if "starts with a change" in message]


def test_a_change_that_is_large_beside_the_weight_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """By default in narrow models, and not at the widths of the paper; once, of the site where it is the largest."""
    (line,) = noticed(square(64, 1 / 8), caplog)
    assert line.startswith("fourierft with alpha=150 starts with a change of 0 that is 6.")
    suggested = float(line.split("; alpha=")[1].split()[0])
    assert not noticed(square(64, 1 / 8), caplog, alpha=suggested * 0.9)
    assert noticed(square(64, 1 / 8), caplog, alpha=suggested * 1.1)
    assert not noticed(square(64, 1 / 8), caplog, init_std=0.0)
    assert not noticed(square(64, 1 / 8), caplog, overrides={"*": {"alpha": 5.0}})
    assert not noticed(square(768, 0.04), caplog)
    assert not noticed(square(64, 0.0), caplog)


@pytest.mark.parametrize("layer", [nn.Linear(80, 60), nn.Conv2d(8, 60, 3), nn.Embedding(90, 50)])
def test_how_large_a_fresh_change_is(layer: nn.Module) -> None:
    before = layer.weight.detach().clone()
    injection = peftcore.apply(One(layer), "fourierft", target="layer", alpha=20.0, init_std=0.7)
    (site,) = injection.sites
    expected = relative_size(site, injection.config)
    injection.merge()
    change = layer.weight.detach() - before
    assert (change.norm() / before.norm()).item() == pytest.approx(expected, rel=0.1)
