"""SparseAdapter: the kit; which weights the authors' code keeps, and what it computes with them; one ranking over a
model; what stays pruned while it trains; what is refused."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftcore
import peftcore_additive.sparse_adapter as module
from peftcore.errors import CalibrationError, ConfigError, NotMergeable
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "sparse_adapter.json"
CODE: Any = {"repository": "Shwai-He/SparseAdapter", "commit": "b190084"}
CODE["script"] = "src/transformers/pruning/pruners.py"
WIDTHS, BOTTLENECK = (8, 5), 3


RANKED = "one ranking goes through all sites, so one site less changes which weights stay"


# snip ranks by gradients, of which rounding makes others: where the kit compares precisions, the draw decides.
@conformance(
    "sparse_adapter",
    options={
        "*": {"bottleneck": 4, "score": "random"},
        "encoder": {"bottleneck": 4, "score": "snip"},
        "unet": {"bottleneck": 6, "score": "random"},  # so that no adapter is pruned whole
    },
    expected_failures={f"the_start_depends_on_seed_and_path-{name}": RANKED for name in HOSTS if name != "encoder"},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


@pytest.fixture
def waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both matrices of the two adapters start as in the script beside the numbers."""
    turn = itertools.cycle((0, 1))

    def drawn(width: int, config: Any) -> Tensor:
        index = next(turn)
        down, up = wave(BOTTLENECK, width, step=1.7 + index), wave(width, BOTTLENECK, step=1.3 + index)
        return torch.cat([down.flatten(), up.flatten()])

    monkeypatch.setattr(module, "drawn", drawn)


@torch.no_grad()
def stack() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double().requires_grad_(False)
    for index, each in enumerate((model[0], model[2])):
        each.weight.copy_(wave(*each.weight.shape, step=0.7 + index))
        each.bias.copy_(wave(*each.bias.shape, step=0.3 + index))
    return model


def batches() -> list[Any]:
    inputs = (wave(4, 6, step=0.9), wave(3, 6, step=1.9))
    return [lambda model, x=x: model(x).square().mean() for x in inputs]


def adapted(score: str, **more: Any) -> tuple[nn.Sequential, peftcore.Injection]:
    model = stack()
    options: Any = {"target": ["0", "2"], "bottleneck": BOTTLENECK, "score": score, "dropout": 0.0, "dtype": "float64"}
    if score in ("snip", "grasp"):
        options["data"] = batches()
    return model, peftcore.apply(model, "sparse_adapter", **options, **more)


@against("authors", "sparse_adapter", **CODE)
def test_numbers_of_the_authors(waves: None) -> None:
    """What each score keeps, in one row of all matrices; then outputs and all gradients, of what snip keeps."""
    numbers = frozen(NUMBERS)
    for score in ("grasp", "magnitude", "snip"):
        model, injection = adapted(score)
        assert injection.shared["kept"].index.tolist() == numbers.pop(score), score
    operators: list[Any] = list(injection.operators.values())
    with torch.no_grad():
        for index, each in enumerate(operators):
            for place, tensor in enumerate((each.down_bias, each.up_bias, each.norm.bias)):
                tensor.copy_(wave(*tensor.shape, step=0.4 + index + place))
            each.norm.weight.copy_(1 + wave(WIDTHS[index], step=0.6 + index))
    x = wave(4, 6, step=0.5).requires_grad_()
    y = model.train()(x)
    (y * wave(4, 5, step=0.2)).sum().backward()
    found = {"y": y, "x": x.grad, "values": injection.shared["kept"].values.grad}
    for index, each in enumerate(operators):
        found |= {f"down {index}": each.down_bias.grad, f"up {index}": each.up_bias.grad}
        found |= {f"gain {index}": each.norm.weight.grad, f"shift {index}": each.norm.bias.grad}
    assert found.keys() == numbers.keys()
    for name, value in found.items():
        assert value is not None and value.abs().max() > 1e-3
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value.flatten(), expected, rtol=1e-9, atol=1e-10, msg=name)


@against("authors", "sparse_adapter", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Of an adapter of which nothing is pruned."""
    options: Any = {"bottleneck": 100, "score": "random", "sparsity": 0.0}
    injection = peftcore.apply(nn.Sequential(nn.Linear(2, 400)), "sparse_adapter", target="0", **options)
    operator: Any = injection.operators["0"]
    down, up = injection.shared["kept"].between(0, 80_000, torch.device("cpu")).chunk(2)
    for name, told in frozen(NUMBERS, "start").items():
        same_start({"down": down, "up": up}[name] if name in ("down", "up") else operator.get_parameter(name), told)


@against("authors", "sparse_adapter", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """How many numbers of each kind, where nothing is pruned. Their command trains no head."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=11, **sizes))
    injection = peftcore.apply(model, "sparse_adapter", bottleneck=BOTTLENECK, score="random", sparsity=0.0)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in injection.parameters()}
    told = frozen(NUMBERS, "trains")
    assert sum(p.numel() for p in injection.parameters()) == sum(told.values())
    found = {"kept": injection.shared["kept"].values.numel()}
    names = {"down_bias": "down_proj.bias", "up_bias": "up_proj.bias"}
    names |= {f"norm.{kind}": f"adapter_layer_norm_before.{kind}" for kind in ("weight", "bias")}
    for ours, theirs in names.items():
        found[theirs] = sum(each.get_parameter(ours).numel() for each in injection.operators.values())
    assert found == {"kept": told.pop("down_proj.weight") + told.pop("up_proj.weight"), **told}


@against("authors", "sparse_adapter", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    """Their command is that of the adapter that the paper compares with, of which nothing is pruned."""
    model, _ = HOSTS["bert"].build()
    data = [lambda host: host(torch.tensor([[5, 3]])).logits.square().sum()]
    injection = peftcore.apply(model, "sparse_adapter", data=data)
    otherwise = {"score": "the paper recommends snip", "sparsity": "the paper recommends to prune 40 %"}
    same_defaults(injection.config, frozen(NUMBERS, "defaults"), otherwise=otherwise)


# Behind which module each adapter of the kit's BERT joins the stream, in the order of the model.
ENDS = [
    f"bert.encoder.layer.{layer}.{end}" for layer in (0, 1) for end in ("attention.output.dropout", "output.dropout")
]


def by_hand(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    z = (x - mean) / (variance + 1e-5).sqrt() * t["norm.weight"] + t["norm.bias"]
    return x + (z @ t["down"].T + t["down_bias"]).clamp(min=0) @ t["up"].T + t["up_bias"]


@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_one_ranking_over_a_model(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BERT of two layers: scores by finite differences of the loss and of its gradient, the equation by hooks."""
    torch.manual_seed(0)
    model, inputs = HOSTS["bert"].build()
    model = model.double().eval().requires_grad_(False)

    def loss(host: nn.Module) -> Tensor:
        output: Tensor = host(**inputs)[0]
        return output[:, 0].square().sum()

    starts: list[Tensor] = []
    draw = module.drawn

    def drawn(width: int, config: Any) -> Tensor:
        starts.append(draw(width, config).double())
        return starts[-1]

    monkeypatch.setattr(module, "drawn", drawn)
    options: Any = {"bottleneck": 2, "sparsity": 0.7, "score": score, "init_std": 0.3, "up_init_std": 0.3}
    injection = peftcore.apply(model, "sparse_adapter", **options, data=[loss, loss], dtype="float64")
    kept: Any = injection.shared["kept"]
    assert kept.total == 4 * 2 * 16 * 2 and len(kept.values) == 256 - math.ceil(0.7 * 256)
    start, chosen, operators = torch.cat(starts), set(kept.index.tolist()), list(injection.operators.values())
    assert torch.equal(start[kept.index.long()], kept.values)
    injection.remove()

    tensors = {"norm.weight": torch.ones(16).double(), "norm.bias": torch.zeros(16).double()}
    tensors |= {"down_bias": torch.zeros(2).double(), "up_bias": torch.zeros(16).double()}
    flat = start.clone().requires_grad_()
    for index, end in enumerate(ENDS):
        part = slice(64 * index, 64 * index + 32), slice(64 * index + 32, 64 * index + 64)
        model.get_submodule(end).register_forward_hook(
            lambda m, args, output, part=part: by_hand(
                output, {**tensors, "down": flat[part[0]].view(2, 16), "up": flat[part[1]].view(16, 2)}
            )
        )
    assert len(operators) == len(ENDS)

    def slope() -> Tensor:
        return torch.autograd.grad(2 * loss(model), flat)[0]

    if score == "snip":
        expected = (start * slope()).abs()
    else:  # H g, as the change of the gradient along g
        g, t = slope(), 1e-5
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                flat.copy_(start + sign * t * g / g.norm())
            moved.append(slope())
        expected = start * (moved[0] - moved[1]) / (2 * t) * g.norm()
    ranked = expected.sort(descending=True).values
    count = len(chosen)
    assert ranked[count - 1] - ranked[count] > 1e-6 * ranked[0]
    assert chosen == set((expected >= ranked[count - 1]).nonzero().flatten().tolist())


def test_what_was_pruned_stays_so() -> None:
    """Momentum and weight decay reach what is kept alone."""
    model, injection = adapted("random", sparsity=0.5)
    kept: Any = injection.shared["kept"]
    fill(injection)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    places = kept.index.clone()
    for _ in range(3):
        model(wave(4, 6, step=0.5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    flat = kept.between(0, kept.total, kept.values.device)
    assert torch.equal(kept.index, places) and int((flat != 0).sum()) == len(places) == 39
    down = injection.operators["2"].kept.module.between(48, 15, flat.device)
    assert torch.equal(down, flat[48:63])


def test_counts_and_sizes() -> None:
    """(1 - sparsity) of 2 d r, and biases and norms whole; the defaults of the paper's Large-Sparse keep its size."""
    model, _ = HOSTS["bert"].build()
    one = peftcore.apply(model, "sparse_adapter", score="random", sparsity=0.0, bottleneck=32, name="one")
    two = peftcore.apply(model, "sparse_adapter", score="random", sparsity=0.5, bottleneck=64, name="two")
    sizes = [injection.shared["kept"].values.numel() for injection in (one, two)]
    assert sizes == [4 * 2 * 16 * 32] * 2
    assert sum(p.numel() for p in two.parameters()) == sizes[1] + 4 * (64 + 16 + 2 * 16)


def test_an_exact_identity_is_possible() -> None:
    model = stack()
    before = model(wave(4, 6, step=0.5))
    peftcore.apply(model, "sparse_adapter", target=["0", "2"], up_init_std=0.0, score="random")
    assert torch.equal(model.eval()(wave(4, 6, step=0.5)), before)


def test_refused_before_anything_changes() -> None:
    model, x = stack(), wave(4, 6, step=0.5)
    for options, error, words in (
        ({}, CalibrationError, "data="),
        ({"score": "magnitude", "data": batches()}, CalibrationError, "it does with score='snip' or 'grasp'"),
        ({"up_init_std": 0.0, "data": batches()}, ConfigError, "score='random'"),
        ({"score": "random", "sparsity": 0.999, "bottleneck": 1}, ConfigError, "leaves none"),
        (
            {"score": "random", "overrides": {"0": {"sparsity": 0.1}}},
            ConfigError,
            "sparsity cannot change at single",
        ),
        ({"data": [lambda host: host(x).sum() * 0.0]}, CalibrationError, "no finite, non-zero gradient"),
        ({"score": "grasp", "data": [lambda host: Once.apply(host(x)) ** 2]}, CalibrationError, "no second derivative"),
    ):
        with pytest.raises(error, match=words):
            peftcore.apply(model, "sparse_adapter", target=["0", "2"], **options)  # type: ignore[arg-type]
    assert torch.equal(model(x), stack()(x))
    with pytest.raises(NotMergeable):
        adapted("random")[1].merge()


class Once(torch.autograd.Function):
    """A sum of squares that has one derivative, and no second."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


@pytest.mark.parametrize("score", ["snip", "grasp", "magnitude", "random"])
def test_which_scores_look_at_data(score: str) -> None:
    method = peftcore.method("sparse_adapter")
    assert method.looks_at_data(method.Config(score=score)) == (score in ("snip", "grasp"))
    assert method.asks_for_data({"score": score}) == (score in ("snip", "grasp"))
