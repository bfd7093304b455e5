"""LoRA-FA, the trained="B" of LoRA: B alone trains, as peft's optimizer trains it."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft.optimizers import create_lorafa_optimizer
from peft_folders import assert_writes
from torch import nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
OPTIONS: dict[str, Any] = {"rank": 3, "alpha": 5.0, "trained": "B"}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 7), (5, 12)),
    "convolution": (lambda: nn.Conv2d(4, 6, (3, 2)), (2, 4, 7, 6)),
}


@conformance("lora", hosts=["llama", "convnet"], options={"*": {"alpha": 12.0, "trained": "B"}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def two() -> Two:
    """Stored one way and the other."""
    return Two(nn.Linear(12, 6), Conv1D(9, 6))


@pytest.mark.parametrize("scaling", ["rank", "sqrt_rank"])
@against("peft 0.21", "lora")
def test_trains_as_peft_does(scaling: str) -> None:
    """Six steps from the same noise. Adam has no epsilon, which peft adds before it corrects the bias."""
    torch.manual_seed(0)
    base = two().double()
    ours, target = deepcopy(base), ["first", "second"]
    injection = peftcore.apply(ours, "lora", target=target, dtype="float64", scaling=scaling, **OPTIONS)
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=scaling == "sqrt_rank", target_modules=target)
    theirs = peft.get_peft_model(deepcopy(base), config).double()
    layers = {name: theirs.get_submodule(f"base_model.model.{name}") for name in target}
    with torch.no_grad():
        for name, layer in layers.items():
            operator = injection.operators[name]
            layer.lora_A["default"].weight.copy_(operator.A.normal_(0, 0.1))
            layer.lora_B["default"].weight.copy_(operator.B.normal_(0, 0.1))
    other = create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=1e-2)
    other.param_groups[0]["eps"] = 0.0
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-2, eps=0.0, weight_decay=0.0)
    assert sum(p.numel() for p in injection.parameters()) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    x, wanted = torch.randn(20, 12).double(), torch.randn(20, 9).double()
    for _ in range(6):
        for model, each in ((ours, optimizer), (theirs, other)):
            loss = (model(x) - wanted).square().mean()
            loss.backward()
            each.step()
            each.zero_grad()
    moved = 0.0
    for name, layer in layers.items():
        operator = injection.operators[name]
        assert torch.equal(operator.A, layer.lora_A["default"].weight)
        torch.testing.assert_close(operator.B, layer.lora_B["default"].weight, rtol=1e-9, atol=1e-12)
        moved += operator.B.abs().sum().item()
    assert moved > 0.1
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_is_the_weights_gradient_on_the_inputs_of_A(kind: str) -> None:
    """A step of SGD changes the weight by -lr G P, for its gradient G and the projection P on the rows of A."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    base = One(make()).double()
    x = torch.randn(shape).double()
    direction = torch.randn_like(base(x))
    (base(x) * direction).sum().backward()
    G = base.layer.weight.grad.flatten(1)
    model = deepcopy(base)
    injection = peftcore.apply(model, "lora", target="layer", dtype="float64", **OPTIONS)
    A = injection.operators["layer"].A.flatten(1)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    (model(x) * direction).sum().backward()
    plain = injection.operators["layer"].B.grad.clone()
    torch.testing.assert_close(plain, 5 / 3 * G @ A.T)  # a gradient like any other, for other optimizers
    optimizer.step()
    injection.bake()
    change = (model.layer.weight - base.layer.weight).flatten(1)
    projection = A.T @ torch.linalg.inv(A @ A.T) @ A
    torch.testing.assert_close(change, -0.1 * G @ projection, rtol=1e-5, atol=1e-7)


def test_half_precision() -> None:
    model = One(nn.Linear(12, 7))
    injection = peftcore.apply(model, "lora", target="layer", dtype="bfloat16", **OPTIONS)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    model(torch.randn(5, 12)).sum().backward()
    optimizer.step()
    assert injection.operators["layer"].B.dtype == torch.bfloat16
    assert injection.operators["layer"].B.abs().max() > 0


def test_B_alone_trains(tmp_path: Path) -> None:
    """A is the adapter's and no parameter; some sites may train both."""
    model, inputs = HOSTS["llama"].build()
    outputs = sum(site.out_features for site in peftcore.plan(model, "lora").sites)
    assert peftcore.plan(model, "lora_fa", rank=2).trainable == 2 * outputs
    injection = peftcore.apply(model, "lora_fa", rank=2, overrides={"*v_proj": {"trained": "both"}})
    assert injection.method.name == "lora"
    held = {(path[-6:], name) for path, each in injection.operators.items() for name, _ in each.named_parameters()}
    assert held == {("q_proj", "B"), ("v_proj", "A"), ("v_proj", "B")}
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-2)
    before = {name: operator.A.clone() for name, operator in injection.operators.items()}
    for _ in range(2):
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, operator in injection.operators.items():
        assert torch.equal(operator.A, before[name]) == name.endswith("q_proj")
        assert operator.B.abs().max() > 0
    injection.save(tmp_path / "adapter")
    other, _ = HOSTS["llama"].build()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k in other.state_dict()})
    peftcore.load(other, tmp_path / "adapter")
    assert torch.equal(other.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_without_the_option_nothing_changes_gradients() -> None:
    injection = peftcore.apply(One(nn.Linear(6, 4)), "lora", target="layer")
    assert injection.method.gradient_rule(injection) is None


def test_in_peft_it_is_a_lora(tmp_path: Path) -> None:
    written = assert_writes(
        two(), "lora", {"target": ["first", "second"], **OPTIONS}, lambda m: m(torch.ones(2, 12)), tmp_path
    )
    assert written["r"] == 3 and written["lora_alpha"] == 5.0


def test_embeddings_are_refused() -> None:
    """Their A is zero, and so B's gradient: peft trains nothing there."""
    with pytest.raises(UnsupportedSite, match="layer is an embedding, whose A starts at zero"):
        peftcore.apply(One(nn.Embedding(9, 5)), "lora_fa", target="layer")
