"""T-LoRA: the promises of the kit, the numbers of the authors' code (`numbers/tlora.json`) and of LyCORIS, the equation
in float64 on convolutions too, and where the timesteps come from."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, NotMergeable, RouteError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS

EXACT = 1e-12
NUMBERS = Path(__file__).parent / "numbers" / "tlora.json"
SCRIPT = run_path(str(NUMBERS.with_suffix(".py")))
RANK, MIN_RANK, wave = SCRIPT["RANK"], SCRIPT["MIN_RANK"], SCRIPT["wave"]
CODE: Any = {"repository": "ControlGenAI/T-LoRA", "commit": "602c4f7", "script": "tlora/model/lora.py"}
START = {"ortho_lora": "random", "lortho_lora": "weight", "lora": "zero"}


@conformance(
    "tlora", telling=["unet"], options={"*": {"rank": 4, "min_rank": 1}}, context=lambda model, x: {"timestep": 600}
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


class One(nn.Module):
    """A host of one layer, which may be given timesteps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
        return self.layer(x)


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


def adapted(layer: nn.Module, **options: Any) -> tuple[Any, peftcore.Injection, Any]:
    """A frozen host in float64 with the method, its injection and the operator."""
    host = One(layer).double().requires_grad_(False)
    options = {"rank": RANK, "min_rank": MIN_RANK, **options}
    injection = peftcore.apply(host, "tlora", target="layer", dtype="float64", **options)
    (operator,) = injection.operators.values()
    return host, injection, operator


@torch.no_grad()
def fill(operator: Any) -> None:
    """Make every tensor N(0, 0.1), what it starts from too."""
    for tensor in (*operator.parameters(), *operator.buffers()):
        tensor.normal_(0, 0.1)


@pytest.mark.parametrize(("timestep", "power"), SCRIPT["TIMESTEPS"].items())
@pytest.mark.parametrize("kind", SCRIPT["KINDS"])
@against("authors", "tlora", **CODE)
def test_outputs_and_gradients_are_those_of_the_authors_code(kind: str, timestep: int, power: float) -> None:
    expected, given = frozen(NUMBERS)[f"{kind} {timestep}"], SCRIPT["tensors"]()
    layer = nn.Linear(SCRIPT["INPUTS"], SCRIPT["OUTPUTS"]).double()
    host, _, operator = adapted(deepcopy(layer), start=START[kind], power=power)
    operator.load_state_dict({name: given[name] for name in operator.state_dict()})
    x = given["x"].requires_grad_()
    update = host.train()(x, timestep) - layer(x).detach()
    (host(x, timestep) * wave(*update.shape)).sum().backward()
    base = (layer(x) * wave(*update.shape)).sum()
    found = {"output": update, "x": x.grad - torch.autograd.grad(base, x)[0]}
    found |= {name: parameter.grad for name, parameter in operator.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        told = torch.tensor(value, dtype=torch.float64).view(found[name].shape)
        assert told.abs().max() > 0.001
        assert difference(found[name].detach(), told) <= EXACT, name


@pytest.mark.parametrize("part", SCRIPT["PARTS"])
@against("authors", "tlora", **CODE, part="start")
def test_random_start_is_the_authors(part: str) -> None:
    """A and B of a square layer, and the singular values of many layers."""
    told, wide, narrow = frozen(NUMBERS, "start")[f"random {part}"], SCRIPT["WIDE"], SCRIPT["NARROW"]
    host = nn.Sequential(nn.Linear(wide, wide), *(nn.Linear(wide, narrow) for _ in range(SCRIPT["LAYERS"])))
    injection = peftcore.apply(host, "tlora", target=r"re:\d+", rank=SCRIPT["PART"], part=part)
    square, *many = injection.operators.values()
    same_start(square.get_parameter("A"), told["A"])
    same_start(square.get_parameter("B"), told["B"])
    same_start(torch.stack([each.get_parameter("values") for each in many]), told["values"])


@pytest.mark.parametrize("part", SCRIPT["PARTS"])
@against("authors", "tlora", **CODE, part="start")
def test_start_of_a_weight_is_the_authors(part: str) -> None:
    """Where the weight is square: where it is not, theirs takes directions and values that do not belong together."""
    layer, told = nn.Linear(SCRIPT["SIDE"], SCRIPT["SIDE"]).double(), frozen(NUMBERS, "start")[f"weight {part}"]
    layer.weight.data.copy_(wave(*layer.weight.shape))
    _, _, operator = adapted(layer, rank=SCRIPT["FEW"], start="weight", part=part)
    same_start(operator.values, told["values"])
    same_start(operator.B * operator.values @ operator.A, told["product"])


@against("authors", "tlora", **CODE, part="start")
def test_zero_start_is_the_authors() -> None:
    """In a layer that has fewer ranks than asked for."""
    told, layer = frozen(NUMBERS, "start")["zero"], nn.Linear(SCRIPT["WIDE"], SCRIPT["NARROW"])
    _, _, operator = adapted(layer, rank=SCRIPT["WIDE"], start="zero")
    same_start(operator.A, told["A"])
    same_start(operator.B, told["B"])


@against("authors", "tlora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """In a UNet: of all queries, keys, values and outputs of attention."""
    pytest.importorskip("diffusers")
    operators = peftcore.apply(HOSTS["unet"].build()[0], "tlora", rank=4, min_rank=1).operators
    ours = {f"{path}.{name}": p.numel() for path, each in operators.items() for name, p in each.named_parameters()}
    assert ours == frozen(NUMBERS, "trains")


@against("authors", "tlora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(One(nn.Linear(64, 64)), "tlora", target="layer")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


@pytest.mark.parametrize(
    ("rank", "least", "power"), [(64, 32, 1.0), (64, 1, 1.0), (10, 3, 1.0), (7, 7, 2.0), (9, 2, 0.5)]
)
def test_the_rank_at_each_timestep_is_that_of_lycoris(rank: int, least: int, power: float) -> None:
    tlora = pytest.importorskip("lycoris.modules.tlora")
    host, _, operator = adapted(nn.Linear(70, 66), rank=rank, min_rank=least, power=power, start="zero")
    steps = torch.arange(1001)
    operator.forward = lambda call, x: operator.mask(torch.zeros(len(x), rank))
    ours = host(torch.zeros(1001, 70).double(), steps)
    its = torch.cat([tlora.compute_timestep_mask(t, 1000, rank, least, power) for t in steps.tolist()])
    assert torch.equal(ours, its)


@pytest.mark.parametrize("part", ["principal", "last", "middle"])
@pytest.mark.parametrize("name", ["linear", "pointwise"])
@against("lycoris 4.1", "tlora")
def test_beside_lycoris(name: str, part: str) -> None:
    """From its start on, with noise in what trains; outputs and gradients, masked as its sampler does it."""
    tlora = pytest.importorskip("lycoris.modules.tlora")
    build, x = {
        "linear": (lambda: nn.Linear(9, 7), torch.randn(2, 3, 9)),
        "pointwise": (lambda: nn.Conv2d(9, 7, 1), torch.randn(2, 9, 3, 4)),
    }[name]
    layer, x = build().double(), x.double()
    module = tlora.TLoraModule("layer", deepcopy(layer), 1.0, RANK, 3.0, sig_type=part).double()
    host, _, operator = adapted(deepcopy(layer), alpha=3.0, start="weight", part=part)
    product = operator.B0 * operator.values0 @ operator.A0.flatten(1)
    its = module.base_p.flatten(1) * module.base_lambda @ module.base_q.flatten(1)
    assert difference(product, its) <= 1e-5  # which it finds in float32
    frozen_theirs = (module.base_q, module.base_p, module.base_lambda)
    starts = zip((operator.A0, operator.B0, operator.values0), frozen_theirs, strict=True)
    theirs = (module.q_layer.weight, module.p_layer.weight, module.lambda_layer)
    trained = list(zip((operator.A, operator.B, operator.values), theirs, strict=True))
    with torch.no_grad():
        for own, other in starts:
            own.copy_(other.view(own.shape))
        for own, other in trained:
            own.normal_(0, 0.1)
            other.copy_(own.view(other.shape))
    for timestep in (0, 400, 999):
        tlora.set_timestep_mask(tlora.compute_timestep_mask(timestep, 1000, RANK, MIN_RANK).double())
        module.zero_grad()
        operator.zero_grad()
        weight = module.get_merged_weight()[0]
        expected = torch.func.functional_call(layer, {"weight": weight}, (x,))
        tlora.clear_timestep_mask()
        ours = host(x, timestep)
        assert difference(layer(x), ours) > 0.01
        assert difference(ours, expected) <= EXACT
        direction = torch.randn_like(ours)
        for output in (ours, expected):
            (output * direction).sum().backward()
        for own, other in trained:
            assert own.grad.abs().max() > 0
            assert difference(own.grad, other.grad.view(own.shape)) <= EXACT


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(4, 5, 8)),
    "rows": (lambda: nn.Linear(8, 6), lambda: torch.randn(12, 8)),  # several of each picture
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), lambda: torch.randn(4, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=2), lambda: torch.randn(4, 4, 5, 6)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.randint(9, (4, 5))),
}


@pytest.mark.parametrize("start", ["random", "weight", "zero"])
@pytest.mark.parametrize("name", LAYERS)
def test_equation_with_a_timestep_for_each_row(name: str, start: str) -> None:
    """Row by row, as the layer with another weight."""
    build, given = LAYERS[name]
    layer, x = build().double(), given()
    x = x.double() if x.is_floating_point() else x
    host, _, operator = adapted(deepcopy(layer), start=start, alpha=3.0, timesteps=1.0, power=2.0)
    fill(operator)
    steps, pieces = torch.tensor([0.9, 0.0, 0.3, 0.5]), []
    for share, piece in zip(steps.tolist(), x.chunk(4), strict=True):
        rank = int((1 - share) ** 2 * (RANK - MIN_RANK)) + MIN_RANK
        A, B = operator.A[:rank].flatten(1), operator.B[:, :rank]
        change = B @ A
        if start != "zero":
            change = B * operator.values[:rank] @ A
            change = change - operator.B0[:, :rank] * operator.values0[:rank] @ operator.A0[:rank].flatten(1)
        change = 3.0 / RANK * change
        stored = change.T if name == "embedding" else change.view(layer.weight.shape)
        pieces.append(torch.func.functional_call(layer, {"weight": layer.weight + stored}, (piece,)))
    expected, parameters = torch.cat(pieces), list(operator.parameters())
    for told in (host(x, steps), peftcore.using(host, timestep=steps, copies=len(x) // 4)(host, x)):
        assert difference(layer(x), expected) > 1e-3
        assert difference(told, expected) <= EXACT
    direction = torch.randn_like(expected)
    ours, its = (torch.autograd.grad((output * direction).sum(), parameters) for output in (told, expected))
    for one, other in zip(ours, its, strict=True):
        assert other.abs().max() > 0
        assert difference(one, other) <= 1e-11


@pytest.mark.parametrize("part", ["last", "principal", "middle"])
@pytest.mark.parametrize("start", ["random", "weight"])
def test_starts_are_orthonormal_with_the_singular_values_of_a_part(start: str, part: str) -> None:
    layer = nn.Linear(30, 20).double()
    _, _, operator = adapted(deepcopy(layer), start=start, part=part)
    eye = torch.eye(RANK).double()
    assert difference(operator.A @ operator.A.T, eye) <= 1e-5
    assert difference(operator.B.T @ operator.B, eye) <= 1e-5
    first = {"principal": 0, "middle": (21 - RANK) // 2, "last": 20 - RANK}[part]
    if start == "weight":
        U, S, V = torch.linalg.svd(layer.weight, full_matrices=False)
        chosen = slice(first, first + RANK)
        assert difference(operator.B * operator.values @ operator.A, U[:, chosen] * S[chosen] @ V[chosen]) <= 1e-5
    else:  # of a random matrix: between the edges of its spectrum, the largest first
        low, high = ((math.sqrt(30) + sign * math.sqrt(20)) / RANK for sign in (-1, 1))
        assert 0.6 * low < operator.values.min() <= operator.values.max() < 1.2 * high
        assert torch.equal(operator.values, operator.values.sort(descending=True).values)
        assert (operator.values.mean() > (low + high) / 2) == (part == "principal")


def unet() -> tuple[Any, dict[str, Tensor]]:
    pytest.importorskip("diffusers")
    model, inputs = HOSTS["unet"].build()
    return model.eval(), inputs


def test_a_unet_is_asked_for_its_own_timesteps() -> None:
    """Of each row; a call goes before them, and what a pipeline gives as a number is one for all."""
    model, inputs = unet()
    base = deepcopy(model)
    injection = peftcore.apply(model, "tlora", rank=4, min_rank=1)
    assert torch.equal(model(**inputs).sample, base(**inputs).sample)
    for operator in injection.operators.values():
        fill(operator)
    steps = {"timestep": torch.tensor([0, 999])}
    with torch.no_grad():
        mixed = model(**{**inputs, **steps}).sample
        for row, step in enumerate((0, 999)):
            alone = model(**{**inputs, "timestep": step}).sample
            told = {name: value[row : row + 1] for name, value in inputs.items()}
            one = model(**{**told, "timestep": torch.tensor(step)}).sample
            torch.testing.assert_close(alone[row], mixed[row])
            torch.testing.assert_close(one[0], mixed[row])
        with peftcore.call(model, timestep=0):
            other = model(**{**inputs, **steps}).sample
        torch.testing.assert_close(other[0], mixed[0])
        assert (other[1] - mixed[1]).abs().max() > 1e-3


def test_who_says_no_timestep_is_told() -> None:
    host, injection, operator = adapted(nn.Linear(8, 6))
    fill(operator)
    x = torch.randn(4, 8).double()
    with pytest.raises(MissingContext, match="timestep"):
        host(x)
    with pytest.raises(RouteError, match="timestep has 3 entries, but a module gets 4 rows"):
        host(x, torch.tensor([1, 2, 3]))
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(ConfigError, match="min_rank=5 is larger than rank=4"):
        peftcore.apply(host, "tlora", name="other", target="layer", rank=4, min_rank=5)
    with pytest.raises(UnsupportedSite, match="is read as a weight, not called"):
        peftcore.apply(One(nn.Conv2d(4, 6, 3, groups=2)), "tlora", target="layer")
