"""Polyhistor: the kit; the equation a second time in hierarchical models and in a plain one, with Kronecker products
that are built, and gradients; the count in a Swin; how it starts; what is refused. (How tasks are told: test_tasks.py.)
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from more_hosts import build
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, UnsupportedSite
from peftcore.testing import conformance
from peftcore.testing.kit import fill

SMALL = {"tasks": 3, "rank": 2, "reduction": 4, "task_width": 5}


KIT = {**SMALL, "reduction": 2, "width": 4, "task": 1}
"""Of templates as narrow as these kernels are larger than one number, and move more where they are near zero."""


@conformance("polyhistor", options={"*": KIT, "bert": {**KIT, "width": None}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def adapters(shared: dict[str, Tensor], down: Tensor, up: Tensor, task: int) -> tuple[Tensor, Tensor]:
    """W_down and W_up of a site for a task, number by number of the templates' factors."""
    made = []
    for kernel, side in ((down, "down"), (up, "up")):
        U, V = (
            sum(shared["embedding"][task, k] * shared[f"{side}_{part}"][..., k] for k in range(SMALL["task_width"]))
            for part in "UV"
        )
        made.append(torch.kron(kernel, U @ V))
    return made[0], made[1]


@pytest.mark.parametrize(
    ("host", "widths"), [("timm_swin", {16, 32}), ("segformer", {8, 16, 24, 32}), ("timm_vit", {48})]
)
def test_the_equation_with_products_that_are_built(host: str, widths: set[int]) -> None:
    """Outputs, and gradients of kernels, maps, embeddings and pictures, for rows of two tasks: by hooks."""

    def fresh() -> tuple[Any, str, Tensor]:
        model, inputs = build(host)
        ((name, pictures),) = ((key, each) for key, each in inputs.items() if each.is_floating_point())
        return model.double().eval(), name, pictures[:2].double().requires_grad_()

    torch.manual_seed(0)
    model, name, pictures = fresh()
    injection: Any = peftcore.apply(model, "polyhistor", **SMALL, dtype="float64")
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    assert {site.out_features for site in injection.sites} == widths
    shared = {
        key: each.detach().clone().requires_grad_() for key, each in injection.shared["templates"].named_parameters()
    }
    kernels = {
        path: [each.detach().clone().requires_grad_() for each in (op.down, op.up)]
        for path, op in injection.operators.items()
    }
    tasks = [2, 0]
    with peftcore.call(model, task=tasks):
        ours = _output(model(**{name: pictures}))
    other, _, pixels = fresh()
    plain = _output(other(**{name: pixels}))
    for path, (down, up) in kernels.items():

        def added(module: nn.Module, args: Any, h: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
            rows = []
            for part, task in zip(h.chunk(len(tasks)), tasks, strict=True):
                W_down, W_up = adapters(shared, down, up, task)
                assert W_down.shape == (h.shape[-1] // 4, h.shape[-1]) == W_up.mT.shape
                rows.append(part + gelu_tanh(part @ W_down.mT) @ W_up.mT)
            return torch.cat(rows)

        other.get_submodule(path).register_forward_hook(added)
    theirs = _output(other(**{name: pixels}))
    assert difference(ours, theirs) < 1e-10 and difference(plain, theirs) > 1e-3
    weights = torch.randn(ours.shape, dtype=torch.float64)
    ours.mul(weights).sum().backward()
    theirs.mul(weights).sum().backward()
    found = dict(injection.shared["templates"].named_parameters())
    pairs = [(pictures, pixels), *((found[key], each) for key, each in shared.items())]
    for path, op in injection.operators.items():
        pairs += zip((op.down, op.up), kernels[path], strict=True)
    for mine, expected in pairs:
        assert expected.grad is not None and expected.grad.abs().max() > 0
        assert difference(mine.grad, expected.grad) < 1e-8


def _output(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def test_rows_and_one_task_for_all() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12)).double()
    fill(peftcore.apply(model, "polyhistor", target="0", **SMALL, width=4, dtype="float64"))
    x, tasks = torch.randn(7, 6).double(), [0, 2, 1, 1, 0, 2, 2]
    with pytest.raises(MissingContext, match="task"):
        model(x)
    with peftcore.call(model, task=tasks):
        together = model(x)
    for row, task in enumerate(tasks):
        with peftcore.call(model, task=task):
            torch.testing.assert_close(model(x[row]), together[row])
            torch.testing.assert_close(model(x)[row], together[row])


def test_count_in_a_swin() -> None:
    """By arithmetic: templates of the first stage, 96 and 3 wide, and two kernels of each adapter, two a block."""
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    plan = peftcore.plan(model, "polyhistor", tasks=4)
    kernels = sum(blocks * 2 * 2 * times**2 for blocks, times in ((2, 1), (2, 2), (6, 4), (2, 8)))
    assert plan.trainable == 64 * (4 + 2 * (96 + 3)) + kernels == 13_864


def test_how_it_starts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 512))
    x = torch.randn(3, 256)
    before = model(x)
    injection: Any = peftcore.apply(model, "polyhistor", target=["0", "1"], tasks=500, rank=8, task=7)
    assert torch.equal(model(x), before)
    for path, times in (("0", 1), ("1", 2)):
        assert torch.equal(injection.operators[path].down, torch.eye(times)) and not injection.operators[path].up.any()
    templates = injection.shared["templates"]
    U, V, up_U, up_V = templates.factors()
    assert U.shape == (500, 8, 8) and V.shape == (500, 8, 256) and up_U.shape == (500, 256, 8)
    assert 0.95 < templates.embedding.std() < 1.05
    inner = torch.randn(20, 8)
    for made, seen in ((U @ V @ torch.randn(256, 20), 1), (up_U @ up_V @ inner.mT, inner.std())):
        assert math.sqrt(0.5) < made.std() / seen < math.sqrt(2)


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12))
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.raises(UnsupportedSite, match=r"1 is 12 wide.* multiple of width=8.*set width=4.*or exclude it"):
        peftcore.apply(model, "polyhistor", target=["0", "1"])
    with pytest.raises(ConfigError, match="rank cannot change at single sites"):
        peftcore.apply(model, "polyhistor", target="0", overrides={"0": {"rank": 3}})
    assert torch.equal(model(x), before) and not peftcore.injections(model)
    peftcore.apply(model, "polyhistor", target=["0", "1"], width=4, overrides={"0": {"activation": "relu"}}).remove()
    peftcore.apply(model, "polyhistor", target=["0", "1"], exclude="1")
