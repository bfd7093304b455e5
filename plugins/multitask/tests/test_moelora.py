"""MOELoRA: the kit; numbers of the authors' layer; kinds of layers that it does not know, a row at a time; what is
refused."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from peft_pairs import difference
from told_tasks import assert_beams_keep_the_tasks_of_their_rows
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, NotMergeable
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

EXPERTS, TASKS, WIDTH = 2, 3, 6
OPTIONS: dict[str, Any] = {"experts": EXPERTS, "rank": 4, "alpha": 3.0, "tasks": TASKS, "task_width": WIDTH}
NUMBERS = Path(__file__).parent / "numbers" / "moelora.json"
CODE: Any = {"repository": "liuqidong07/MOELoRA-peft", "commit": "2d9efa4"}
CODE["script"] = "src/MLoRA/peft/tuners/mmoelora.py"
SCRIPT = run_path(str(NUMBERS.with_suffix(".py")))
wave = SCRIPT["wave"]


# On BERT and the UNet three steps of a small update move the gates of some keys and queries by less than float32 has.
@conformance(
    "moelora",
    options={"*": {**OPTIONS, "task": 1}, "bert": {"alpha": 480.0}, "unet": {**OPTIONS, "task": 1, "alpha": 240.0}},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@conformance("moelora", telling=["llama"], options={"*": {**OPTIONS, "task": 1, "gate": "each"}})
def test_conformance_with_a_gate_each(check: Callable[[], None]) -> None:
    check()


def gate_of(injection: peftcore.Injection) -> Any:
    """The gate that sites share."""
    return dict(injection.modules())["shared:tasks"]


@against("authors", "moelora", **CODE)
def test_numbers_of_the_authors() -> None:
    """Outputs for rows of all tasks, and gradients, of two layers with one gate."""
    model, numbers = SCRIPT["Pair"]().double().eval(), frozen(NUMBERS)["shared"]
    injection = peftcore.apply(model, "moelora", target=["one", "two"], **OPTIONS, dtype="float64")
    gate, layers = gate_of(injection), injection.operators
    tensors = {"vectors": gate.vectors, "gate": gate.gate}
    for layer, operator in layers.items():
        for kind in "AB":
            tensors |= {f"{layer}.{kind}.{e}": operator.get_parameter(kind)[e] for e in range(EXPERTS)}
    SCRIPT["filled"](tensors)
    with peftcore.call(model, task=[*range(TASKS)]):
        y = model(wave(TASKS, 3, 5, step=0.9))
    (y * wave(TASKS, 3, 5, step=0.3)).sum().backward()
    found = {"y": y, "vectors": gate.vectors.grad, "gate": gate.gate.grad}
    for layer, operator in layers.items():
        for kind in "AB":
            found |= {f"{layer}.{kind}.{e}": operator.get_parameter(kind).grad[e] for e in range(EXPERTS)}
    assert numbers.keys() == found.keys()
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value.flatten(), expected, rtol=1e-9, atol=1e-10, msg=name)


@against("authors", "moelora", **CODE)
def test_numbers_of_the_authors_layer_with_a_gate_of_its_own() -> None:
    """Outputs for rows of two tasks, and gradients."""
    model = nn.Sequential(nn.Linear(5, 4)).double().eval()
    injection = peftcore.apply(model, "moelora", target="0", **OPTIONS, gate="each", dtype="float64")
    op: Any = injection.operators["0"]
    with torch.no_grad():
        model[0].weight.copy_(wave(4, 5, step=1.1))
        model[0].bias.copy_(wave(4, step=1.3))
        op.vectors.copy_(wave(TASKS, WIDTH, step=0.7))
        op.gate.copy_(wave(EXPERTS, WIDTH, step=0.5))
        op.A.copy_(wave(EXPERTS, 2, 5, step=1.7))
        op.B.copy_(wave(EXPERTS, 4, 2, step=2.3))
    with peftcore.call(model, task=[2, 0]):
        y = model(wave(2, 3, 5, step=0.9))
    (y * wave(2, 3, 4, step=0.3)).sum().backward()
    found = {"y": y, "A": op.A.grad, "B": op.B.grad, "vectors": op.vectors.grad, "gate": op.gate.grad}
    numbers = frozen(NUMBERS)["each"]
    assert numbers.keys() == found.keys()
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value.flatten(), expected, rtol=1e-9, atol=1e-10, msg=name)


@against("authors", "moelora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    options = {"experts": 20, "rank": 40, "tasks": 20, "task_width": 2000}
    injection = peftcore.apply(nn.Sequential(nn.Linear(2000, 4)), "moelora", target="0", **options)
    parts = [*gate_of(injection).named_parameters(), *injection.operators["0"].named_parameters()]
    told, ours = frozen(NUMBERS, "start"), dict(parts)
    assert told.keys() == ours.keys()
    for name, value in ours.items():
        same_start(value, told[name])


@against("authors", "moelora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """One gate and one table for all layers."""
    injection = peftcore.apply(SCRIPT["Pair"](), "moelora", target=["one", "two"], **OPTIONS)
    ours = {name: value.numel() for name, value in gate_of(injection).named_parameters()}
    for layer, operator in injection.operators.items():
        for kind, value in operator.named_parameters():
            ours |= {f"{layer}.{kind}.{e}": value[e].numel() for e in range(EXPERTS)}
    assert ours == frozen(NUMBERS, "trains")


@against("authors", "moelora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "moelora", target="0")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"), otherwise={"tasks": "theirs are those of their data"})


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear-2d": lambda: (nn.Linear(12, 8), torch.randn(4, 12)),
    "linear-unbatched": lambda: (nn.Linear(12, 8), torch.randn(12)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), torch.randn(4, 4, 7, 6)),
    "embedding": lambda: (nn.Embedding(20, 6), torch.tensor([[0, 3, 5], [1, 1, 19], [2, 0, 4], [7, 8, 9]])),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_layers_against_the_equation(kind: str) -> None:
    """The effective weight of each task, in float64, run by the layer itself: a row at a time."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    base = nn.Sequential(layer).double()
    x = x.double() if x.is_floating_point() else x
    model = deepcopy(base).eval()
    injection = peftcore.apply(model, "moelora", target="0", **OPTIONS, dropout=0.0, dtype="float64")
    fill(injection)
    op: Any = injection.operators["0"]
    gate = gate_of(injection)
    alone = "unbatched" in kind
    tasks = [2] if alone else [2, 0, 1, 2]
    with peftcore.call(model, task=2 if alone else tasks):
        ours = model(x)[None] if alone else model(x)
    for row, task in enumerate(tasks):
        shares = (gate.gate @ gate.vectors[task]).exp()
        shares = shares / shares.sum()
        update = sum(shares[e] * torch.einsum("or,r...->o...", op.B[e], op.A[e]) for e in range(EXPERTS)) * 3 / 4
        twin = deepcopy(base)
        twin[0].weight.data += update.T if kind == "embedding" else update
        expected = twin(x) if alone else twin(x)[row]
        assert difference(expected, base(x) if alone else base(x)[row]) > 1e-3
        torch.testing.assert_close(ours[row], expected, rtol=1e-10, atol=1e-10)


def test_beams_keep_the_tasks_of_their_rows() -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model.eval(), "moelora", **OPTIONS)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 1)
    assert_beams_keep_the_tasks_of_their_rows(model, inputs["input_ids"], [2, 0])


def test_sizes_of_a_gate_for_all_and_of_one_each() -> None:
    """Experts of each site may have ranks of their own, and with a gate each their own number too."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5))
    told: dict[str, Any] = {"target": ["0", "1"], **OPTIONS}
    experts, gate = 2 * 4 * (5 + 4), (TASKS + EXPERTS) * WIDTH
    assert peftcore.plan(model, "moelora", **told).trainable == experts + gate
    assert peftcore.plan(model, "moelora", **told, gate="each").trainable == experts + 2 * gate
    more = peftcore.plan(model, "moelora", **told, overrides={"1": {"rank": 8}}).trainable
    assert more == experts + 4 * (5 + 4) + gate
    more = peftcore.plan(model, "moelora", **told, gate="each", overrides={"1": {"experts": 4}}).trainable
    assert more == experts + 2 * gate + 2 * WIDTH


def test_files_from_before_gates_were_shared_keep_one_each() -> None:
    """The folder of the first version, which `tests/saved` loads too."""
    folder = Path(__file__).parents[3] / "tests/saved/moelora"
    model, _ = HOSTS["llama"].build()
    loaded = peftcore.load(model.double(), folder)
    assert loaded.config.gate == "each"
    gates = [operator.get_parameter("gate") for operator in loaded.operators.values()]
    assert len(gates) == 14 and not torch.equal(gates[0], gates[1])


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(400, 300))
    injection = peftcore.apply(model, "moelora", target="0")
    with pytest.raises(NotMergeable):
        injection.merge()
    for gate, options in (("shared", {"experts": 4}), ("shared", {"tasks": 2}), ("each", {"gate": "shared"})):
        with pytest.raises(ConfigError, match="overrides cannot change"):
            peftcore.plan(nn.Sequential(nn.Linear(4, 4)), "moelora", target="0", gate=gate, overrides={"0": options})
    with pytest.raises(ConfigError, match="cannot be split equally"):
        peftcore.apply(nn.Sequential(nn.Linear(4, 4)), "moelora", target="0", rank=4, experts=3)
