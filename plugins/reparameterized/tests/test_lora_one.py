"""LoRA-One beside its authors' code and its equation; that its start is a step; its optimizer and its files."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, One, assert_equation, experts, hosted
from peft.optimizers import create_riemannian_optimizer
from peft_folders import assert_same, fill
from peft_pairs import difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Loss, Two

import peftcore
from peftcore.errors import CalibrationError
from peftcore.testing import against, conformance, frozen, same_defaults, same_start

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
CODE: Any = {"repository": "YuanheZ/LoRA-One", "commit": "01bba05", "script": "run_exp.py"}
NUMBERS = Path(__file__).parent / "numbers" / "lora_one.json"
SEEN = "gradients of a host in half precision are rounded, so the factors are others"
DROPS = (
    "the host drops values while gradients are looked at, as in training, and the kit takes that away from one of two"
)
HOSTS = ("mlp", "encoder", "llama", "bert", "t5", "gpt2", "moe", "mistral", "vit", "unet", "dit", "convnet")


@conformance(
    "lora_one",
    options={"*": {"rank": 3, "alpha": 3.0}},
    expected_failures={
        **{f"merging_rounds_once-{each}": SEEN for each in HOSTS},
        **{f"dropout_acts_in_training_only-{each}": DROPS for each in ("bert", "t5", "gpt2")},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def as_the_authors() -> tuple[Any, Tensor, Tensor, peftcore.Injection]:
    """Returns their model with the adapter, a batch, what came out of it before, and the injection."""
    numbers = {name: torch.tensor(value).double() for name, value in frozen(NUMBERS).items()}
    model = Loss(nn.Linear(5, 4)).double()
    with torch.no_grad():
        model.layer.weight.copy_(numbers["weight"])
        model.layer.bias.copy_(numbers["bias"])
    x, y = numbers["x"], numbers["y"]
    data = [{"x": x[i : i + 2], "y": y[i : i + 2]} for i in (0, 2, 4)]
    base = model(x)
    injection = peftcore.apply(model, "lora_one", target="layer", rank=2, alpha=3.0, dtype="float64", data=data)
    return model, x, base, injection


@against("authors", "lora_one", **CODE)
def test_beside_the_authors_code() -> None:
    """What comes out, from the same batches."""
    model, x, base, _ = as_the_authors()
    assert difference(model(x), torch.tensor(frozen(NUMBERS)["output"]).double()) <= 1e-5
    assert difference(model(x), base) >= 1e-3


@against("authors", "lora_one", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Factors up to signs of both, and what they add."""
    told = {name: torch.tensor(value) for name, value in frozen(NUMBERS, "start").items()}
    (operator,) = as_the_authors()[3].operators.values()
    same_start(operator.A.abs(), told["A"].abs().tolist())
    same_start(operator.B.abs(), told["B"].abs().tolist())
    same_start(operator.B @ operator.A, (told["B"] @ told["A"]).tolist())


@against("authors", "lora_one", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    (operator,) = as_the_authors()[3].operators.values()
    trained = {f"layer.lora_{name}.default.weight": value.numel() for name, value in operator.named_parameters()}
    assert trained == frozen(NUMBERS, "trains")


@against("authors", "lora_one", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    host, data, _ = batches("linear")
    same_defaults(peftcore.apply(host, "lora_one", target="layer", data=data).config, frozen(NUMBERS, "defaults"))


def batches(kind: str) -> tuple[One, list[Callable[[nn.Module], Tensor]], Tensor]:
    """The host, two batches of losses, and the mean gradient of its weight, [out, in, *kernel] of each expert."""
    host, x = hosted(kind)
    direction = torch.randn(host(x).shape, generator=torch.Generator().manual_seed(2)).double()
    data = [lambda model: (model(x) * direction).mean(), lambda model: model(x).square().mean()]
    weight = host.get_parameter(KINDS[kind].tensor).requires_grad_(True)
    for each in data:
        (each(host) / 2).backward()
    gradient = weight.grad.T if KINDS[kind].transposed else weight.grad
    weight.requires_grad_(False)
    weight.grad = None
    return host, data, gradient


@pytest.mark.parametrize("iterations", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_a_step_against_the_gradient(kind: str, iterations: int | None) -> None:
    """By the eigenvectors of G G', another algorithm: the nearest of rank r to -G / (S_1 gamma), in equal parts."""
    host, data, gradient = batches(kind)
    options: dict[str, Any] = {"rank": 3, "alpha": 5.0, "gamma": 20.0, "iterations": iterations}
    injection = peftcore.apply(
        host, "lora_one", target=KINDS[kind].target, dtype="float64", seed=0, data=data, **options
    )
    (operator,) = injection.operators.values()
    of_each = list(gradient) if kind == "experts" else [gradient]
    for each, (_, tensors) in zip(of_each, experts(kind, operator), strict=True):
        G = each.flatten(1)
        values, vectors = torch.linalg.eigh(G @ G.T)
        nearest = -vectors[:, -3:] @ vectors[:, -3:].T @ G / (values[-1].sqrt() * 20.0)
        A, B = tensors["A"].flatten(1), tensors["B"]
        assert difference(B @ A, nearest) <= 1e-8
        assert difference(A @ A.T, B.T @ B) <= 1e-8
    assert operator.scale == pytest.approx(5 / 3**0.5)
    x = hosted(kind)[1]
    assert difference(host(x), hosted(kind)[0](x)) >= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """With noise in both factors: outputs, gradients and merged weights."""
    _, data, _ = batches(kind)

    def equation(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return weight + 5 / 3 * (tensors["B"] @ tensors["A"].flatten(1)).view(weight.shape)

    assert_equation(kind, "lora_one", equation, rank=3, alpha=5.0, scaling="rank", data=data)


def test_a_small_step_lowers_the_loss_and_no_other_of_its_size_and_rank_by_more() -> None:
    """To first order. LoRA's start, and that of the other sign, do not."""
    host, data, G = batches("linear")
    before = (data[0](host) + data[1](host)) / 2
    peftcore.apply(host, "lora_one", target="layer", dtype="float64", rank=2, alpha=1.0, gamma=1e5, data=data)
    after = (data[0](host) + data[1](host)) / 2
    S = torch.linalg.svdvals(G)
    expected = -(S[:2].square().sum()) / (S[0] * 1e5) / 2**0.5
    assert after < before
    assert difference(after - before, expected) <= 1e-3


def test_what_has_fewer_directions_or_no_gradient_starts_as_lora() -> None:
    """More rank than there is, and an expert that no batch reaches: both go on as in LoRA, and all of them train."""
    host, data, _ = batches("wide")
    injection = peftcore.apply(host, "lora_one", target="layer", dtype="float64", rank=9, data=data)
    (operator,) = injection.operators.values()
    assert operator.A.shape == (9, 6) and operator.B.shape == (11, 9)
    assert operator.A.abs().sum(1).min() > 0 and operator.B[:, :6].any() and not operator.B[:, 6:].any()
    stack, x = hosted("experts")
    data = [lambda model: model(x)[:2].square().mean()]
    injection = peftcore.apply(stack, "lora_one", target="layer.stack", dtype="float64", rank=2, data=data)
    (operator,) = injection.operators.values()
    assert operator.A.isfinite().all() and operator.B.isfinite().all()
    assert operator.B[:2].any() and not operator.B[2].any() and operator.A[2].any()


def test_needs_data_that_is_finite() -> None:
    host, _ = hosted("linear")
    with pytest.raises(CalibrationError, match="lora_one looks at data before training"):
        peftcore.apply(host, "lora_one", target="layer")
    with pytest.raises(CalibrationError, match="the gradient of layer is not finite"):
        peftcore.apply(host, "lora_one", target="layer", data=[lambda model: model(hosted("linear")[1]).sum() / 0])
    assert not peftcore.injections(host)


def two() -> Two:
    """Stored one way and the other."""
    return Two(nn.Linear(12, 6), Conv1D(9, 6))


def paired(damping: float | None) -> tuple[nn.Module, peftcore.Injection, Any, Tensor]:
    """A model with LoRA-One, and peft's LoRA with the same factors."""
    torch.manual_seed(0)
    base, target = two().double(), ["first", "second"]
    ours, x = deepcopy(base), torch.randn(20, 12).double()
    data = [lambda model: model(x).square().mean()]
    injection = peftcore.apply(
        ours, "lora_one", target=target, dtype="float64", rank=3, alpha=5.0, damping=damping, data=data
    )
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=target)
    theirs = peft.get_peft_model(deepcopy(base), config).double()
    with torch.no_grad():
        for name, operator in injection.operators.items():
            layer = theirs.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.copy_(operator.A)
            layer.lora_B["default"].weight.copy_(operator.B)
    return ours, injection, theirs, x


@pytest.mark.parametrize("damping", [None, 1e-6])
@against("peft 0.21", "lora_one")
def test_trains_as_lora_of_peft_does_from_that_start(damping: float | None) -> None:
    """Five steps in float64, without the preconditioners and with them."""
    ours, injection, theirs, x = paired(damping)
    count = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    assert count == sum(parameter.numel() for parameter in injection.parameters()) == 3 * (12 + 6 + 6 + 9)
    arguments: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0}
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    other = (
        torch.optim.AdamW(trained, **arguments)
        if damping is None
        else create_riemannian_optimizer(theirs, torch.optim.AdamW, reg=damping, **arguments)
    )
    optimizer = injection.optimizer(torch.optim.AdamW, **arguments)
    start = ours(x).detach()
    assert difference(theirs(x), start) <= 1e-10
    for _ in range(5):
        for model, each in ((ours, optimizer), (theirs, other)):
            (model(x) - 1).square().mean().backward()
            each.step()
            each.zero_grad()
    assert difference(theirs(x), ours(x)) <= 1e-8
    assert difference(ours(x), start) >= 1e-3


def test_in_peft_it_is_a_lora(tmp_path: Path) -> None:
    ours, injection, _, x = paired(None)
    base = deepcopy(ours)
    peftcore.injections(base)["lora_one"].remove()
    fill(injection.parameters())
    injection.save(tmp_path / "adapter", format="peft")
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "adapter")).eval()
    assert theirs.peft_config["default"].use_rslora and theirs.peft_config["default"].r == 3
    loaded = deepcopy(base)
    assert peftcore.load(loaded, tmp_path / "adapter").method.name == "lora"
    assert_same(base(x), ours.eval()(x), theirs(x))
    assert_same(base(x), ours(x), loaded(x))
