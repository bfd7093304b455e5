"""LoRA-GA beside peft's, beside the authors' start and its equation; what it computes once it has trained."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from peft_folders import assert_same, fill
from peft_pairs import difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
RANK = 2


SEEN = "gradients of a host in half precision are rounded, so the factors are others"
HOSTS = ("mlp", "encoder", "llama", "bert", "t5", "gpt2", "moe", "mistral", "vit", "unet", "dit", "convnet")
DROPS = (
    "the host drops values while gradients are looked at, as in training, and the kit takes that away from one of two"
)


@conformance(
    "lora_ga",
    options={"*": {"rank": 3, "alpha": 3.0}},
    expected_failures={
        **{f"merging_rounds_once-{each}": SEEN for each in HOSTS},
        "low_precision_hosts_keep_their_dtype-moe": SEEN,
        **{f"dropout_acts_in_training_only-{each}": DROPS for each in ("bert", "t5", "gpt2")},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Two(nn.Module):
    """Layers stored one way and the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 7), Conv1D(9, 7)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.second(torch.tanh(self.first(x)))
        return y if labels is None else {"loss": nn.functional.cross_entropy(y, labels)}


def host() -> nn.Module:
    torch.manual_seed(0)
    return Two()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": 3 * torch.randn(n, 12, generator=generator), "labels": torch.randint(9, (n,), generator=generator)}
        for n in (8, 9, 7)
    ]


def gradients() -> dict[str, Tensor]:
    """The mean over the batches in float64, [out, in]."""
    model = host().double()
    for batch in batches():
        (model(batch["x"].double(), batch["labels"])["loss"] / 3).backward()
    return {"first": model.first.weight.grad, "second": model.second.weight.grad.T}


def apply(model: nn.Module, **options: Any) -> peftcore.Injection:
    given = {"rank": RANK, "alpha": 6.0, **options}
    data = [{**batch, "x": batch["x"].to(next(model.parameters()).dtype)} for batch in batches()]
    return peftcore.apply(model, "lora_ga", target=["first", "second"], data=data, **given)


DIRECTIONS = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}
SCALES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "stable": lambda W, S: len(W) ** 0.25 / 16**0.5,
    "unit": lambda W, S: 1.0,
    "gd_scale": lambda W, S: 1 / 3,
    "weight_svd": lambda W, S: (S[:RANK] / 3).sqrt().mean(),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_start_of_the_authors(direction: str, scale: str) -> None:
    """Orthonormal rows and columns, each the eigenvectors of G G' or G' G that the direction says, up to their sign."""
    injection = apply(host().double(), direction=direction, scale=scale, dtype="float64")
    model = host().double()
    weights = {"first": model.first.weight.detach(), "second": model.second.weight.detach().T}
    for path, G in gradients().items():
        operator = injection.operators[path]
        rows, columns = DIRECTIONS[direction]
        V = torch.linalg.eigh(G.T @ G).eigenvectors.flip(1)[:, rows]
        U = torch.linalg.eigh(G @ G.T).eigenvectors.flip(1)[:, columns]
        k = SCALES[scale](weights[path], torch.linalg.svdvals(weights[path]))
        assert difference(operator.A.abs(), k * V.T.abs()) <= 1e-7
        assert difference(operator.B.abs(), k * U.abs()) <= 1e-7
        assert torch.equal(operator.A, operator.A0) and torch.equal(operator.B, operator.B0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@against("peft 0.21", "lora_ga")
def test_beside_peft(direction: str, scale: str) -> None:
    """peft's form, from the same batches, up to signs; then, with noise in both, outputs and gradients.

    At transformers' Conv1D peft takes the number of inputs for `out` in its stable scale; there they differ by that.
    """
    base = host()
    model, theirs = deepcopy(base), deepcopy(base)
    injection = apply(model, form="peft", direction=direction, scale=scale)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=["first", "second"],
        fan_in_fan_out=False,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.tuners.lora.config.LoraGAConfig(direction=direction, scale=scale),
    )

    def step() -> None:
        for batch in batches():
            theirs(**batch)["loss"].backward()

    preprocess_loraga(theirs, config, step)
    tuner = peft.LoraModel(theirs, config, "default")
    x = batches()[0]["x"]
    assert difference(theirs(x), base(x)) <= 1e-5
    count = sum(p.numel() for p in tuner.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in injection.parameters()) == RANK * (12 + 7 + 7 + 9)
    pairs, generator = [], torch.Generator().manual_seed(4)
    for path, operator in injection.operators.items():
        layer: Any = theirs.get_submodule(path)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        by_A, by_B = ((each.detach() * own.detach()) for each, own in ((A, operator.A), (B, operator.B)))
        of_A, of_B = by_A.sum(1, keepdim=True).sign(), by_B.sum(0).sign()
        stored = (7 / 9) ** 0.25 if path == "second" and scale == "stable" else 1.0
        assert difference(operator.A * of_A, A) <= 1e-3
        assert difference(operator.B * of_B * stored, B) <= 1e-3
        with torch.no_grad():  # peft's base has its own start in it, and so it stays comparable
            operator.B.mul_(stored)
            operator.B0.mul_(stored)
            for own, given, sign in ((operator.A, A, of_A), (operator.B, B, of_B)):
                noise = torch.randn(own.shape, generator=generator) * 0.1
                own.add_(noise)
                given.copy_(own * sign)
        pairs += [(operator, layer, of_A, of_B)]
    ours = model.train()(x)
    assert difference(ours, base(x)) >= 1e-2
    for operator, layer, of_A, of_B in pairs:  # signs of A and B are found alone, so peft gets those of ours
        layer.lora_A["default"].weight.data.mul_(of_A)
        layer.lora_B["default"].weight.data.mul_(of_B)
        start = operator.scale * (operator.B0 @ operator.A0)
        path = "first" if layer is theirs.get_submodule("first") else "second"
        weight = base.get_submodule(path).weight.detach()
        layer.base_layer.weight.data = weight - (start if path == "first" else start.T)
    expected = theirs.train()(x)
    assert difference(ours, expected) <= 1e-4
    direction_of = torch.randn_like(ours)
    (ours * direction_of).sum().backward()
    (expected * direction_of).sum().backward()
    for operator, layer, _, _ in pairs:
        assert difference(operator.A.grad, layer.lora_A["default"].weight.grad) <= 1e-3
        assert difference(operator.B.grad, layer.lora_B["default"].weight.grad) <= 1e-3


def test_rank_is_at_most_half_of_the_directions() -> None:
    injection = apply(host(), rank=9)
    assert [tuple(each.A.shape) for each in injection.operators.values()] == [(3, 12), (3, 7)]
    with pytest.raises(UnsupportedSite, match="a single singular direction"):
        peftcore.plan(nn.Sequential(nn.Linear(4, 1)), "lora_ga", target="0")


def test_the_first_step_is_nearest_to_that_of_the_weight() -> None:
    """Of B A, to first order, as the paper wants it: no other 2 r directions have more of the gradient."""
    model = host().double()
    injection = apply(model, scale="unit", dtype="float64", alpha=float(RANK))
    for path, G in gradients().items():
        operator = injection.operators[path]
        step = operator.B0 @ operator.B0.T @ G + G @ operator.A0.T @ operator.A0
        U, S, V = torch.linalg.svd(G, full_matrices=False)
        best = (U[:, : 2 * RANK] * S[: 2 * RANK]) @ V[: 2 * RANK]
        assert difference(step, best) <= 1e-7


def test_files_of_peft(tmp_path: Path) -> None:
    """Written as LoRA of twice the rank. peft's own says nothing of the base that it was made on, whose tensors are
    others: it is read as peft reads it, as a LoRA."""
    base, x = host().eval(), batches()[0]["x"]
    ours = deepcopy(base)
    injection = apply(ours)
    fill(injection.parameters())
    injection.save(tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "ours")).eval()
    assert_same(base(x), ours.eval()(x), theirs(x))
    config = peft.LoraConfig(
        r=RANK,
        target_modules=["first", "second"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.tuners.lora.config.LoraGAConfig(),
    )
    other = deepcopy(base)
    preprocess_loraga(other, config, lambda: [other(**batch)["loss"].backward() for batch in batches()])
    model = peft.get_peft_model(other, config)
    fill(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(str(tmp_path / "theirs"))
    again = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "theirs")).eval()
    loaded = deepcopy(base)
    assert peftcore.load(loaded, tmp_path / "theirs").method.name == "lora"
    assert_same(base(x), loaded(x), again(x))
