"""RegMean: the kit; weights that the authors' code makes of three models and their data; that it is the regression
which it says it is; the equation with parts of several kinds, with gradients; adapters out of files; refusals."""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from merging_toys import X, applied, equal, host, moved
from safetensors.torch import load_file, save_file
from sines import wave
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import CalibrationError, ConfigError
from peftcore.testing import against, conformance, frozen, same_defaults
from peftcore_multitask import gather
from peftcore_multitask.regmean import grams, take_grams

NUMBERS = Path(__file__).parent / "numbers" / "regmean.json"
CODE: Any = {"repository": "bloomberg/dataless-model-merging", "commit": "92247ae"}
CODE["script"] = "src/model_merge/avg_merger.py"
TARGET = {"target": ["first", "second"]}


@conformance("regmean")
def test_conformance(check: Callable[[], None]) -> None:
    check()


CASES: dict[str, tuple[float, list[float] | None]] = {
    "mostly whole": (0.875, None),
    "whole": (1.0, None),
    "diagonal": (0.0, None),
    "weighted": (0.125, [0.5, 0.125, 0.375]),
}


class Toy(nn.Sequential):
    """The host of the numbers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.double().eval()


@pytest.mark.parametrize("case", CASES)
@against("authors", "regmean", **CODE)
def test_numbers_of_the_authors(case: str) -> None:
    """Whole weights and biases of three models, whose matrices of inputs are made of their data as the authors'
    notebook makes them. The third part has the values of LoRAs and bias offsets, which are the same thing."""
    off_diagonal, weights = CASES[case]
    model = Toy()
    every = []
    for t in range(3):
        part = peftcore.apply(model, "linear_probe", name=f"a{t}", target=["0", "2"], dtype="float64")
        values = [operator.value for operator in part.operators.values()]
        assert len(values) == 4
        with torch.no_grad():
            for k, value in enumerate(values):
                value.copy_(wave(value.shape, 0.7 + 0.31 * t + 0.17 * k))
        data = [(wave((*shape, 4), 0.9 + 0.41 * t),) for shape in ((2, 7), (3, 2))]
        every.append(grams(part, data))
        peftcore.activate(model)
    sources = dict(zip(("a0", "a1", "a2"), weights or [1.0] * 3, strict=True))
    merged = gather(model, "regmean", sources, off_diagonal=off_diagonal)
    plain = model(wave((2, 4), 0.3)).detach()
    take_grams(merged, every)
    moved = model(wave((2, 4), 0.3)).detach()
    assert not equal(plain, moved)
    merged.merge()
    numbers = frozen(NUMBERS)[case]
    assert equal(model(wave((2, 4), 0.3)), moved) and len(numbers) == 4
    for name, expected in numbers.items():
        value = model.get_parameter(name.replace("first", "0").replace("second", "2"))
        assert equal(value.flatten(), torch.tensor(expected, dtype=torch.float64))


LORA = {"method": "lora", "rank": 2, **TARGET}


def batches(seed: int, count: int = 3) -> list[tuple[Tensor]]:
    """Of a task, whose inputs lie mostly in directions of its own."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return [(torch.randn(9, 6, generator=generator, dtype=torch.float64) @ turn,) for _ in range(count)]


@against("authors", "regmean", **CODE, part="defaults")
def test_default_is_the_authors() -> None:
    """Of their notebook and of one configuration; others of theirs have 0.1."""
    model = Toy()
    for name in ("one", "two"):
        peftcore.apply(model, "linear_probe", name=name, target=["0", "2"])
    same_defaults(gather(model, "regmean", {"one": 1.0, "two": 1.0}).config, frozen(NUMBERS, "defaults"))


def test_it_is_the_regression_on_what_each_part_puts_out() -> None:
    """With whole matrices, by least squares over the rows of all tasks, of the layer's own inputs and outputs."""
    model, rows, outputs, every = host().train(), [], [], []
    for seed, name in enumerate(("one", "two")):
        part = applied(model, "lora", seed, name=name, rank=2, dropout=0.5, **TARGET)
        with torch.no_grad(), peftcore.activate(model.eval(), name):
            rows.append(torch.tanh(model.first(torch.cat([batch for (batch,) in batches(seed)]))))
            outputs.append(model.second(rows[-1]) - model.second.bias)
        model.train()
        every.append(grams(part, batches(seed)))
        assert model.training and model.first.training
    merged = gather(model.eval(), "regmean", {"one": 2.0, "two": 1.0}, off_diagonal=1.0)
    take_grams(merged, every)
    root = torch.tensor([2.0, 1.0], dtype=torch.float64).sqrt().repeat_interleave(27)[:, None]
    best = torch.linalg.lstsq(root * torch.cat(rows), root * torch.cat(outputs)).solution.mT
    assert moved(model)
    lora, error = peftcore.to_lora(merged, 4)
    assert equal(model.second.weight + peftcore.deltas(lora)["second"], best) and max(error.values()) == 0
    peftcore.activate(model, merged.name)
    merged.merge()
    assert equal(model.second.weight, best)


def test_the_equation_with_factors_gains_and_values() -> None:
    """Outputs and gradients; a part that is not at a layer leaves the base there, whose inputs count; biases have the
    mean. Weights of the first layer are stored transposed."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 6), nn.Tanh(), nn.Linear(8, 5)).double().eval()
    W0, b0, W2, b2 = (p.detach().clone() for p in model.parameters())
    parts: list[dict[str, Any]] = [
        {"method": "linear_probe", "target": ["0"]},
        {"method": "lora", "rank": 2, "target": ["0", "2"]},
        {"method": "ia3", "target": ["2"]},
    ]
    every: list[dict[str, Tensor]] = []
    for seed, part in enumerate(parts):
        options = {key: value for key, value in part.items() if key != "method"}
        alone = applied(model, part["method"], seed, name=f"a{seed}", **options)
        with peftcore.activate(model, alone.name):
            every.append(grams(alone, batches(seed), also=["0", "2"]))
    shares = {}
    for path in ("0", "2"):
        G = torch.stack([each[path] for each in every])
        G = 0.7 * G + 0.3 * torch.stack([torch.diag(each.diagonal()) for each in G])
        shares[path] = torch.linalg.solve(G.sum(0), G, left=False)
    merged = gather(model, "regmean", {"a0": 1.0, "a1": 1.0, "a2": 1.0}, off_diagonal=0.7)
    take_grams(merged, every)
    merged.trainable()
    first, bias, second = (merged.operators[path].parts for path in ("0", "0.bias", "2"))

    def low(part: Any) -> Tensor:
        A, B, scale = part.factors()
        return scale * B @ A

    V0 = W0 + ((first["0"].value.T - W0.T) @ shares["0"][0] + low(first["1"]) @ shares["0"][1]).T
    gain = second["2"].gain
    V2 = W2 + low(second["1"]) @ shares["2"][1] + (gain[:, None] - 1) * W2 @ shares["2"][2]
    c0, c2 = b0 + (bias["0"].value - b0) / 3, b2 + (gain - 1) * b2 / 3
    x = X.clone().requires_grad_()
    ours, expected = model(x), linear(torch.tanh(linear(x, V0.T, c0)), V2, c2)
    assert equal(ours, expected)
    held = [x, *merged.parameters()]
    direction = wave(ours.shape, 0.7)
    found = torch.autograd.grad((ours * direction).sum(), held)
    for mine, theirs in zip(found, torch.autograd.grad((expected * direction).sum(), held), strict=True):
        assert equal(mine, theirs) and mine.abs().max() > 1e-4
    merged.merge()
    assert equal(model[0].weight, V0) and equal(model[2].weight, V2) and equal(model[2].bias, c2)


def test_adapters_and_matrices_out_of_files(tmp_path: Path) -> None:
    model, every = host(), []
    for seed in range(2):
        part = applied(model, "lora", seed, name=f"a{seed}", rank=2, **TARGET)
        every.append(grams(part, batches(seed)))
        part.save(tmp_path / f"a{seed}")
        save_file(every[-1], tmp_path / f"a{seed}.safetensors")
        part.remove()
    merged = gather(model, "regmean", {tmp_path / f"a{seed}": 1.0 for seed in range(2)})
    mean = model(X).detach()
    take_grams(merged, [load_file(tmp_path / f"a{seed}.safetensors") for seed in range(2)])
    assert moved(model) and not equal(model(X), mean)
    merged.save(tmp_path / "merged")
    again = host()
    peftcore.load(again, tmp_path / "merged")
    assert torch.equal(again(X), model(X))


FUSION = Path(__file__).parent / "numbers" / "mix_of_show.json"
SCRIPT = run_path(str(FUSION.with_suffix(".py")))


@pytest.mark.parametrize("case", SCRIPT["CASES"])
@against("others", "regmean", repository="TencentARC/Mix-of-Show", commit="51270fd", script="gradient_fusion.py")
def test_gradient_fusion_is_the_regression_that_keeps_the_base(case: str) -> None:
    """As near as their L-BFGS comes to it, with more inputs than directions and with fewer; each row counts alike."""
    model, sources, every = nn.Sequential(nn.Linear(6, 5, bias=False)).double(), {}, []
    with torch.no_grad():
        model[0].weight.copy_(SCRIPT["base"]())
    for concept, rows in enumerate(SCRIPT["CASES"][case]):
        options = {"rank": SCRIPT["RANK"], "alpha": SCRIPT["RANK"] * SCRIPT["ALPHA"], "target": ["0"]}
        part = applied(model, "lora", name=f"a{concept}", **options)
        operator: Any = part.operators["0"]
        with torch.no_grad():
            for mine, theirs in zip((operator.A, operator.B), SCRIPT["factors"](concept), strict=True):
                mine.copy_(theirs)
        every.append(grams(part, [(SCRIPT["inputs"](case, concept),)]))
        peftcore.activate(model)
        sources[f"a{concept}"] = float(rows)
    merged = gather(model, "mix_of_show", sources)
    assert merged.method.name == "regmean" and merged.name == "mix_of_show"
    take_grams(merged, every)
    merged.merge()
    expected = torch.tensor(frozen(FUSION)[case], dtype=torch.float64)
    assert (model[0].weight.flatten() - expected).abs().max() < 1e-7
    assert (expected - SCRIPT["base"]().flatten()).abs().max() > 0.1


def test_an_input_that_no_task_has_keeps_the_mean() -> None:
    every = []
    model = host()
    for seed in range(2):
        part = applied(model, "lora", seed, name=f"a{seed}", **TARGET)
        every.append(grams(part, [(batch * torch.tensor([0, 1, 1, 1, 1, 1]),) for (batch,) in batches(seed)]))
    merged = gather(model, "regmean", {"a0": 3.0, "a1": 1.0})
    take_grams(merged, every)
    shares: Any = merged.operators["first"].shares
    assert shares[:, 0, 0].tolist() == pytest.approx([0.75, 0.25]) and not shares[:, 0, 1:].any()
    assert equal(shares.sum(0), torch.eye(6)) and (shares[0] - 0.75 * torch.eye(6)).abs().max() > 0.1


def test_what_is_refused() -> None:
    """Nothing has changed then."""
    model = host()
    with pytest.raises(ConfigError, match="above 0"):
        peftcore.plan(model, "regmean", parts=[LORA, LORA], weights=[1.0, -1.0])
    parts = [applied(model, "lora", seed, name=f"a{seed}", target=["second"]) for seed in range(2)]
    merged = gather(model, "regmean", {"a0": 1.0, "a1": 1.0}, off_diagonal=1.0)
    every, before = [grams(part, batches(seed)) for seed, part in enumerate(parts)], model(X).detach()
    for told, error, words in (
        (every[:1], ConfigError, "1 were passed"),
        ([every[0], {}], ConfigError, "part 1 has no matrix"),
        ([every[0], {"second": torch.eye(6)}], ConfigError, "part 1"),
        ([every[0], {"second": every[1]["second"] / 0}], ConfigError, "part 1"),
        ([grams(part, [(X[:3],)]) for part in parts], CalibrationError, "too few"),
    ):
        with pytest.raises(error, match=words):
            take_grams(merged, told)
    with pytest.raises(ConfigError, match="is a lora"):
        take_grams(parts[0], every)
    with pytest.raises(ConfigError, match="no module 'third'"):
        grams(parts[0], batches(0), also=["third"])
    with pytest.raises(CalibrationError, match="no batches"):
        grams(parts[0], [])
    with pytest.raises(CalibrationError, match="second got no inputs, or some"):
        grams(parts[0], [(X / 0,)])
    bias = applied(model, "bitfit", name="bias", target=["second"])
    with pytest.raises(ConfigError, match="averaged as they are"):
        grams(bias, batches(0))
    peftcore.activate(model, merged.name)
    assert torch.equal(model(X), before)
    merged.merge()
    with pytest.raises(ConfigError, match="unmerge"):
        take_grams(merged, every)
    with pytest.raises(ConfigError, match="unmerge"):
        grams(merged, batches(0))
