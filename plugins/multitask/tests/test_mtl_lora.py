"""MTL-LoRA: the kit; numbers of the authors' own layer, in training with the same draws, whose softmax is in float32;
the equation in float64 for several kinds of layers; how it starts; what is refused. (How tasks are told:
test_tasks.py.)"""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_pairs import difference
from told_tasks import assert_beams_keep_the_tasks_of_their_rows
from torch import Tensor, nn

import peftcore
from peftcore.errors import NotMergeable, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

TASKS, UPS, RANK, ALPHA, TEMPERATURE = 4, 3, 2, 3.0, 0.5
OPTIONS: dict[str, Any] = {"tasks": TASKS, "ups": UPS, "rank": RANK, "alpha": ALPHA, "temperature": TEMPERATURE}
NUMBERS = Path(__file__).parent / "numbers" / "mtl_lora.json"
CODE: Any = {"repository": "pUmpKin-Co/MTL-LoRA", "commit": "7848a70", "script": "src/adapter/mlora.py"}


@conformance("mtl_lora", options={"*": {"tasks": TASKS, "task": 1, "rank": RANK}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(0), sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@against("authors", "mtl_lora", **CODE)
def test_numbers_of_the_authors(kind: str) -> None:
    """The output, then the gradients, of rows of two tasks: half of the input is dropped."""
    model = nn.Sequential(nn.Linear(5, 4)).double()
    options = {**OPTIONS, "task_matrix": kind, "dropout": 0.5}
    injection = peftcore.apply(model, "mtl_lora", target="0", **options, dtype="float64")
    op: Any = injection.operators["0"]
    with torch.no_grad():
        model[0].weight.copy_(wave(4, 5, step=1.1))
        model[0].bias.copy_(wave(4, step=1.3))
        op.A.copy_(wave(2, 5, step=1.7))
        op.B.copy_(wave(3, 4, 2, step=2.3))
        op.middle.copy_(wave(*op.middle.shape, step=0.7))
        op.logits.copy_(wave(4, 3, step=1.9))
    x = wave(2, 3, 5, step=0.9).requires_grad_()
    torch.manual_seed(0)
    with peftcore.call(model, task=[2, 0]):
        y = model(x)
    (y * wave(2, 3, 4, step=0.3)).sum().backward()
    found = {"y": y, "A": op.A.grad, "B": op.B.grad, "middle": op.middle.grad, "logits": op.logits.grad, "x": x.grad}
    numbers = frozen(NUMBERS)[kind]
    assert {*numbers} == {*found}
    for name, value in numbers.items():
        assert difference(found[name].flatten(), torch.tensor(value, dtype=torch.float64)) < 1e-6, name


@against("authors", "mtl_lora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    told, model = frozen(NUMBERS, "start"), nn.Sequential(nn.Linear(2000, 4))
    options = {"rank": 20, "ups": 20, "tasks": 2000, "task_matrix": "diagonal"}
    op: Any = peftcore.apply(model, "mtl_lora", target="0", **options).operators["0"]
    for name in ("A", "B", "logits"):
        same_start(getattr(op, name), told[name])
    for kind in ("full", "diagonal"):
        small = peftcore.apply(
            nn.Sequential(nn.Linear(5, 4)), "mtl_lora", target="0", tasks=2, rank=3, task_matrix=kind
        )
        same_start(small.operators["0"].middle, told[kind])


@against("authors", "mtl_lora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "mtl_lora", target="0", tasks=2, ups=3, rank=2)
    trained = {name: each.numel() for name, each in injection.operators["0"].named_parameters() if each.requires_grad}
    assert trained == frozen(NUMBERS, "trains")


@against("authors", "mtl_lora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "mtl_lora", target="0")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(12, 8), torch.randn(4, 3, 12)),
    "linear-2d": lambda: (nn.Linear(12, 8), torch.randn(4, 12)),
    "linear-unbatched": lambda: (nn.Linear(12, 8), torch.randn(12)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), torch.randn(4, 4, 7, 6)),
    "conv2d-unbatched": lambda: (nn.Conv2d(4, 6, 3, padding=1), torch.randn(4, 5, 5)),
    "embedding": lambda: (nn.Embedding(20, 6), torch.tensor([[0, 3, 5], [1, 1, 19], [2, 0, 4], [7, 8, 9]])),
}


@pytest.mark.parametrize("task_matrix", ["full", "diagonal"])
@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_layers_against_the_equation(kind: str, task_matrix: str) -> None:
    """The effective weight of each task, in float64, run by the layer itself: a row at a time."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    base = nn.Sequential(layer).double()
    x = x.double() if x.is_floating_point() else x
    model = deepcopy(base)
    options = {**OPTIONS, "task_matrix": task_matrix, "dropout": 0.0}
    injection = peftcore.apply(model, "mtl_lora", target="0", **options, dtype="float64")
    fill(injection)
    op: Any = injection.operators["0"]
    alone = "unbatched" in kind
    tasks = [2] if alone else [2, 0, 3, 1]
    with peftcore.call(model, task=2 if alone else tasks):
        ours = model(x)[None] if alone else model(x)
    for row, task in enumerate(tasks):
        middle = op.middle[task] if task_matrix == "full" else op.middle[task].diag()
        weights = (op.logits[task] / TEMPERATURE).exp()
        B = sum(weights[i] * op.B[i] for i in range(UPS)) / weights.sum()
        update = ALPHA / RANK * torch.einsum("or,rq,q...->o...", B, middle, op.A)
        twin = deepcopy(base)
        twin[0].weight.data += update.T if kind == "embedding" else update
        expected = twin(x) if alone else twin(x)[row]
        assert difference(expected, base(x) if alone else base(x)[row]) > 1e-3
        torch.testing.assert_close(ours[row], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("host", ["llama", "t5"])
def test_beams_keep_the_tasks_of_their_rows(host: str) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS[host].build()
    injection = peftcore.apply(model.eval(), "mtl_lora", **OPTIONS)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 1)
    assert_beams_keep_the_tasks_of_their_rows(model, inputs["input_ids"], [3, 0])


def test_how_it_starts_and_what_it_cannot_do() -> None:
    model = nn.Sequential(nn.Linear(100, 7))
    x = torch.randn(3, 100)
    before = model(x)
    injection = peftcore.apply(model, "mtl_lora", target="0", **OPTIONS)
    with peftcore.call(model, task=[0, 1, 2]):
        assert torch.equal(model(x), before)
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(UnsupportedSite, match="dropout=0"):
        peftcore.apply(nn.Sequential(nn.Embedding(20, 6)), "mtl_lora", target="0")
    with pytest.raises(UnsupportedSite, match="read, not called"):
        peftcore.apply(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "mtl_lora", target="0")
