"""VeLoRA beside peft's and beside the authors' equation: what is kept, and what gradient comes of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from one_layer import One
from peft_folders import assert_reads, assert_writes
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


@conformance("velora", options={"*": {"rank": 3, "num_groups": 4}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def kept(x: Tensor, v: Tensor, groups: int) -> Tensor:
    """Each group in turn: what of it lies along v."""
    size = len(v)
    x = torch.cat([x, x.new_zeros(len(x), groups * size - x.shape[1])], 1)
    parts = [(part @ v).unsqueeze(1) * v for part in x.split(size, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("groups", [1, 3, 5, 12, 20])
def test_gradient_of_A(groups: int) -> None:
    """Beside the equation, in float64. With as many groups as inputs nothing is lost, but for a scale."""
    torch.manual_seed(0)
    model, x = One(nn.Linear(12, 7)).double(), torch.randn(2, 5, 12).double().requires_grad_()
    options = {"rank": 3, "alpha": 6.0, "num_groups": groups, "rebuilt_scale": 0.5, "dtype": "float64"}
    injection = peftcore.apply(model, "velora", target="layer", **options)
    (operator,) = injection.operators.values()
    operator.B.data.normal_()
    y = model.train()(x)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    rows, g = x.detach().reshape(-1, 12), direction.reshape(-1, 7)
    size = -(-12 // groups)
    padded = torch.cat([rows, rows.new_zeros(10, groups * size - 12)], 1)
    v = padded.reshape(-1, size).mean(0)
    v = v / v.norm()
    assert difference(operator.v, v) <= 1e-10
    z = 2.0 * g @ operator.B.detach()
    expected = z.T @ kept(rows, v, groups)[:, :12] * 0.5
    assert difference(operator.A.grad, expected) <= 1e-10
    if groups >= 12:
        assert difference(operator.A.grad, z.T @ rows * 0.5) <= 1e-10
    else:
        assert difference(operator.A.grad, z.T @ rows * 0.5) > 1e-2
    weight = model.layer.weight.detach() + 2.0 * operator.B.detach() @ operator.A.detach()
    assert difference(x.grad.reshape(-1, 12), g @ weight) <= 1e-10
    assert difference(y, model.eval()(x)) <= 1e-10


def test_the_direction_of_the_first_batch_stays(tmp_path: Path) -> None:
    model = One(nn.Linear(12, 7))
    injection = peftcore.apply(model, "velora", target="layer", num_groups=3)
    (operator,) = injection.operators.values()
    assert not operator.v.any()
    model.eval()(torch.randn(4, 12))
    assert not operator.v.any()
    model.train()(torch.randn(4, 12))
    first = operator.v.clone()
    assert first.norm().item() == pytest.approx(1.0)
    model(torch.randn(4, 12))
    assert torch.equal(operator.v, first)
    injection.save(tmp_path)
    injection.remove()
    loaded = peftcore.load(model, tmp_path)
    assert torch.equal(loaded.operators["layer"].v, first)


def test_what_is_kept_is_small() -> None:
    """A number a group in place of the inputs."""
    saved: list[Tensor] = []
    x = torch.randn(64, 48, requires_grad=True) * 1
    for method, options in (("velora", {"num_groups": 4}), ("lora", {})):
        model = One(nn.Linear(48, 32)).requires_grad_(False)
        peftcore.apply(model, method, target="layer", rank=2, **options)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            model.train()(x)
        assert (sum(t.shape == x.shape for t in saved) == 0) == (method == "velora")


def test_refusals() -> None:
    with pytest.raises(UnsupportedSite, match="keeps no inputs"):
        peftcore.apply(One(nn.Conv2d(3, 4, 2)), "velora", target="layer")


def two() -> Two:
    """Layers stored one way and the other."""
    return Two(nn.Linear(12, 7), Conv1D(9, 7))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.A", operator.A, layer.lora_A[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.B", operator.B, layer.lora_B[ADAPTER].weight, lambda t: t)
    if operator.projection == "random":
        operator.v.copy_(layer.lora_velora_embed[ADAPTER])


KINDS = {"first": "batch_average_once", "each": "batch_average", "random": "random"}


@pytest.mark.parametrize("groups", [3, 5])
@pytest.mark.parametrize("projection", KINDS)
@against("peft 0.21", "velora")
def test_beside_peft(projection: str, groups: int) -> None:
    """Outputs, gradients and merged weights in training, of two batches one after the other; and as many parameters."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["first", "second"],
        velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=groups, scale=0.5, init_type=KINDS[projection]),
    )
    ours = {"rank": 3, "alpha": 6.0, "num_groups": groups, "projection": projection, "rebuilt_scale": 0.5}
    both = Both(two().train(), "velora", {"target": ["first", "second"], **ours}, config, pairs)
    count = sum(p.numel() for p in both.tuner.model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in both.injection.parameters()) == 3 * (12 + 7 + 7 + 9)
    for _ in range(2):
        x = torch.randn(2, 4, 12)
        for pair in both.pairs:
            pair.ours.grad = pair.theirs.grad = None
        both.assert_same_gradients(*both.assert_same_outputs(lambda model, x=x: model(x)))
    both.assert_same_merged()


@pytest.mark.parametrize("projection", KINDS)
def test_files_of_peft(projection: str, tmp_path: Path) -> None:
    model, inputs = HOSTS["llama"].build()

    def run(adapted: nn.Module) -> Tensor:
        return adapted(**inputs).logits

    options = {"target": ["attn.v"], "rank": 4, "num_groups": 3, "projection": projection}
    written = assert_writes(model, "velora", options, run, tmp_path)
    assert written["velora_config"] == {"num_groups": 3, "init_type": KINDS[projection], "scale": 0.1}
    config = peft.LoraConfig(
        r=4,
        target_modules=["v_proj"],
        velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=3, init_type=KINDS[projection]),
        task_type="CAUSAL_LM",
    )
    injection = assert_reads(model, config, run, tmp_path / "read")
    assert (injection.method.name, injection.config.projection) == ("velora", projection)
    assert injection.config.rebuilt_scale == 1.0
