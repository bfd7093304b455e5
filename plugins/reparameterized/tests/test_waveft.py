"""WaveFT beside peft's and beside its equation, a transform of the whole matrix; its filters and its positions."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation
from one_layer import One
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance
from peftcore_reparameterized.waveft import low_pass

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
N = 30
WAVELETS = [None, "db1", "db2", "db3", "db10"]


# Fewer coefficients than these hosts have weights.
@conformance("waveft", options={"*": {"n_frequency": 9}, "task": {"n_frequency": 400}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def synthesis(size: int, padded: int, taps: Tensor) -> Tensor:
    """What half of the coefficients of a side becomes: [size, padded / 2]."""
    length = len(taps)
    full = torch.zeros(padded - 2 + length, padded // 2, dtype=torch.float64)
    for k in range(padded // 2):
        full[2 * k : 2 * k + length, k] = taps
    return full[length - 2 :][:size]


def transformed(wavelet: str | None, entries: list[int]) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """The equation, with the whole matrix of coefficients."""

    def equation(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        out, inputs = weight.flatten(1).shape
        c = dict(zip(entries, tensors["c"], strict=True))
        if wavelet is None:
            rows = [torch.stack([c.get(o * inputs + i, torch.zeros(()).double()) for i in range(inputs)])
                    for o in range(out)]  # fmt: skip
            return weight + 25 * torch.stack(rows).view(weight.shape)
        low = low_pass(int(wavelet[2:]))
        high = torch.stack([(-1) ** k * low[len(low) - 1 - k] for k in range(len(low))])
        height, width = (size + len(low) - 2 + size % 2 for size in (out, inputs))
        places = {((e // inputs) + (height - out) // 2, (e % inputs) + (width - inputs) // 2): value
                  for e, value in c.items()}  # fmt: skip
        zero = torch.zeros(()).double()
        whole = torch.stack([torch.stack([places.get((u, v), zero) for v in range(width)]) for u in range(height)])
        upper, lower = whole.chunk(2)
        f = {name: synthesis(out, height, taps) for name, taps in (("low", low), ("high", high))}
        g = {name: synthesis(inputs, width, taps) for name, taps in (("low", low), ("high", high))}
        update = f["low"] @ upper.chunk(2, 1)[0] @ g["low"].T + f["high"] @ upper.chunk(2, 1)[1] @ g["low"].T
        update = update + f["low"] @ lower.chunk(2, 1)[0] @ g["high"].T + f["high"] @ lower.chunk(2, 1)[1] @ g["high"].T
        return weight + 25 * update.view(weight.shape)

    return equation


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str, wavelet: str | None) -> None:
    weight = adapted(kind, "waveft", n_frequency=N, wavelet=None)[2]
    assert_equation(kind, "waveft", transformed(wavelet, weight.entries.tolist()), n_frequency=N, wavelet=wavelet)


@pytest.mark.parametrize("moments", range(1, 11))
def test_filters(moments: int) -> None:
    """Each is orthogonal to itself moved on by two, and its high-pass filter has as many vanishing moments."""
    low = low_pass(moments)
    assert len(low) == 2 * moments
    assert low.sum().item() == pytest.approx(math.sqrt(2))
    for shift in range(moments):
        product = (low[2 * shift :] * low[: len(low) - 2 * shift]).sum().item()
        assert product == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-10)
    signs = torch.tensor([(-1) ** k for k in range(len(low))])
    place = torch.arange(len(low)).double() / len(low)
    assert all(abs((signs * low * place**power).sum()) < 1e-9 for power in range(moments))


def test_the_update_of_haar_is_as_long_as_its_coefficients() -> None:
    layer = nn.Linear(12, 8).double()
    before = layer.weight.detach().clone()
    injection = peftcore.apply(One(layer), "waveft", target="layer", n_frequency=N, alpha=3.0, dtype="float64")
    c = nn.init.normal_(injection.operators["layer"].c)
    injection.merge()
    assert difference((layer.weight - before).norm(), 3 * c.norm()) <= 1e-12


def test_refusals() -> None:
    with pytest.raises(UnsupportedSite, match="84 coefficients, fewer than n_frequency=85"):
        adapted("linear", "waveft", n_frequency=85)
    for wavelet in ("db11", "db0", "haar", "sym4"):
        with pytest.raises(ConfigError, match="wavelet"):
            adapted("linear", "waveft", n_frequency=N, wavelet=wavelet)


def two() -> Two:
    """Odd and even sides; stored one way and the other."""
    return Two(nn.Linear(12, 7), Conv1D(8, 7))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(site.path, operator.c, layer.waveft_spectrum[ADAPTER], lambda t: t)


def both(base: nn.Module, target: list[str], wavelet: str | None, transposed: bool, seed: int = 777) -> Both:
    config = peft.WaveFTConfig(
        target_modules=target, n_frequency=N, wavelet_family=wavelet or "db1", use_idwt=wavelet is not None,
        random_loc_seed=seed, fan_in_fan_out=transposed,
    )  # fmt: skip
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    ours = {"target": target, "n_frequency": N, "wavelet": wavelet, "entry_seed": seed, "dtype": dtype}
    return Both(base, "waveft", ours, config, pairs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("target", ["first", "second"])
@against("peft 0.21", "waveft")
def test_beside_peft(target: str, wavelet: str | None, training: bool) -> None:
    """Outputs, gradients, merged weights, and as many parameters."""
    torch.manual_seed(0)
    compared = both(two().double().train(training), [target], wavelet, target == "second", seed=5)
    count = sum(p.numel() for p in compared.tuner.model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in compared.injection.parameters()) == N
    x = torch.randn(2, 3, 12).double()
    compared.assert_same(lambda model: model(x))


@against("peft 0.21", "waveft")
def test_a_model_beside_peft() -> None:
    model, inputs = HOSTS["llama"].build()
    compared = both(model.eval(), ["q_proj", "v_proj"], "db2", False)
    compared.assert_same(lambda adapted: adapted(**inputs).logits)
