"""GLoRA beside peft's and beside numbers of the authors' layer; its equation on the kinds of layers that both lack;
layers without a bias."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_pairs import ADAPTER, Both, Pair
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill


@conformance("glora")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def pairs(site: peftcore.author.Site, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    for name in "ABCDE":
        for their, our in (("X", name), ("Xd", name), ("Xu", f"{name}_up")):
            tensor = getattr(getattr(layer, f"glora_{name}")[ADAPTER], their, None)
            if tensor is not None:
                mine = operator.get_parameter(our)
                yield Pair(f"{site.path}.{our}", mine, tensor, lambda t, shape=mine.shape: t.view(shape))


CHOICES = [
    pytest.param("lora", "lora", "constant", id="default"),
    pytest.param("vector", "vector", "vector", id="vectors"),
    pytest.param("constant", "none", "none", id="constants"),
    pytest.param("none", "lora", "vector", id="bias"),
]


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize(("matrices", "column", "vectors"), CHOICES)
@against("peft 0.21", "glora")
def test_beside_peft(matrices: Any, column: Any, vectors: Any) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS["bert"].build()
    target = ["query", "value", "output.dense"]
    config = peft.GloraConfig(r=3, target_modules=target, config_A_B=matrices, config_C=column, config_D_E=vectors)
    options = {"A": matrices, "B": matrices, "C": column, "D": vectors, "E": vectors}
    both = Both(model, "glora", {"rank": 3, "target": target, **options}, config, pairs)
    both.assert_same(lambda each: each(**inputs).logits)


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


NUMBERS = Path(__file__).parent / "numbers" / "glora.json"
CODE: Any = {"repository": "Arnav0400/ViT-Slim", "commit": "0fed674", "script": "GLoRA/layer.py"}


@pytest.mark.parametrize("bias", [True, False])
@against("authors", "glora", **CODE)
def test_the_authors_numbers(bias: bool) -> None:
    """Outputs and the gradient of E; peft leaves C and E away where there is no bias."""
    model = nn.Sequential(nn.Linear(6, 4, bias=bias)).double().requires_grad_(False)
    model[0].weight.copy_(wave((4, 6), 0.9))
    if bias:
        model[0].bias.copy_(wave((4,), 0.8))
    choice = {"A": "lora", "B": "vector", "C": "lora", "D": "constant", "E": "vector"}
    injection = peftcore.apply(model, "glora", target="0", rank=2, dtype="float64", **choice)
    values = dict(injection.operators["0"].named_parameters())
    theirs = {"A": wave((4, 2), 0.3), "A_up": wave((2, 6), 0.5), "B": wave((4, 2), 0.7)[:, :1]}
    theirs |= {"C": wave((6, 2), 0.9), "C_up": wave((2, 1), 1.1), "E": wave((4, 1), 1.5)}
    theirs |= {"D": wave((1, 1), 1.3)} if bias else {}
    assert values.keys() == theirs.keys()
    with torch.no_grad():
        for name, value in theirs.items():
            values[name].copy_(value)
    y = model(wave((2, 6), 0.5))
    y.square().sum().backward()
    numbers = frozen(NUMBERS)[str(bias)]
    assert y.flatten().tolist() == pytest.approx(numbers["outputs"], abs=1e-10)
    assert values["E"].grad.flatten().tolist() == pytest.approx(numbers["E"], abs=1e-10)


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "conv1d-of-transformers": lambda: (Conv1D(5, 6), torch.randn(3, 6)),
    "grouped": lambda: (nn.Conv2d(4, 6, (3, 2), groups=2, bias=False), torch.randn(2, 4, 5, 5)),
    "transposed": lambda: (nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 5)),
    "embedding": lambda: (nn.Embedding(9, 5), torch.tensor([[0, 8, 3]])),
}


@pytest.mark.parametrize("name", LAYERS)
def test_equation_on_other_layers(name: str) -> None:
    """The layer itself with W' and b', put there by hand; merging gives the same, and gives a bias where none was."""
    layer, x = LAYERS[name]()
    x = x.double() if x.is_floating_point() else x
    model = nn.Sequential(layer).double().requires_grad_(False)
    before = model(x)
    injection = peftcore.apply(model, "glora", target="0", rank=2, dtype="float64", D="vector", E="vector")
    fill(injection)
    operator = injection.operators["0"]
    v = {key: p.detach() for key, p in operator.named_parameters()}
    logical = operator.layer.logical(layer.weight)
    W, b = logical.flatten(1), layer._parameters.get("bias")
    expected = W * (1 + v["A"] @ v["A_up"]) + v["B"] @ v["B_up"]
    shift = torch.zeros(len(W)).double() if b is None else b * (1 + v["D"][:, 0])
    assert ("D" in v) == (b is not None) and ("C" in v) == ("E" in v) == (name != "embedding")
    if "C" in v:
        shift = shift + W @ (v["C"] @ v["C_up"])[:, 0] + v["E"][:, 0]
    adapted = model(x)
    injection.bake()
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(operator.layer.logical(layer.weight).flatten(1), expected, rtol=1e-12, atol=1e-12)
    if name != "embedding":
        torch.testing.assert_close(layer.bias, shift, rtol=1e-12, atol=1e-12)
    assert (adapted - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("name", ["linear", *LAYERS])
def test_a_product_multiplies_the_inputs(name: str) -> None:
    layer, x = LAYERS[name]() if name in LAYERS else (nn.Linear(6, 5), torch.randn(3, 6))
    model = nn.Sequential(layer).double().requires_grad_(False)
    injection = peftcore.apply(model, "glora", target="0", rank=2, dtype="float64", A="product", B="none")
    fill(injection)
    operator = injection.operators["0"]
    before = operator.layer.logical(layer.weight)
    matrix = (operator.get_parameter("A") @ operator.get_parameter("A_up")).detach()
    expected = torch.einsum("oi...,ij->oj...", before, matrix) + before
    adapted = model(x.double() if x.is_floating_point() else x)
    injection.bake()
    torch.testing.assert_close(operator.layer.logical(layer.weight), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x.double() if x.is_floating_point() else x), adapted, rtol=1e-10, atol=1e-10)
    assert (expected - before).abs().max() > 1e-2 * before.abs().max()


@against("authors", "glora", **CODE, part="start")
def test_start() -> None:
    """The second factors are drawn, by the sizes of each, all else is zero."""
    told, vectors = frozen(NUMBERS, "start"), {"D": "vector", "E": "vector"}
    large, column = (
        peftcore.apply(nn.Sequential(layer), "glora", target="0", rank=rank, **vectors).operators["0"]
        for layer, rank in ((nn.Linear(300, 300), 200), (nn.Linear(2, 2), 40000))
    )
    same_start(column.get_parameter("C_up"), told.pop("C_up"))
    assert told.keys() | {"C_up"} == dict(large.named_parameters()).keys()
    for name, each in told.items():
        same_start(large.get_parameter(name), each)


@against("authors", "glora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The terms of a layer, here with D and E as long as theirs, and the head, which `train` names here."""
    model = nn.Sequential()
    for name, layer in {"qkv": nn.Linear(6, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 3)}.items():
        model.add_module(name, layer)
    head = {name: each.numel() for name, each in model.named_parameters() if name.startswith("head")}
    options: dict[str, Any] = {"rank": 2, "D": "vector", "E": "vector", "train": ["head"]}
    injection = peftcore.apply(model, "glora", target="qkv", **options)
    names = {"A": "Ad", "A_up": "Au", "B": "Bd", "B_up": "Bu", "C": "Cd", "C_up": "Cu", "D": "D", "E": "E"}
    own = dict(injection.operators["qkv"].named_parameters())
    sizes = head | {f"qkv.{names[name]}": each.numel() for name, each in own.items()}
    assert sum(each.numel() for each in injection.parameters()) == sum(sizes.values())
    assert {name: torch.Size(shape).numel() for name, shape in frozen(NUMBERS, "trains").items()} == sizes


@against("authors", "glora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(HOSTS["bert"].build()[0], "glora")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"), otherwise={"rank": "peft's, whose choices these are"})


def test_sites_may_choose_for_themselves() -> None:
    """What a search found is said in `overrides`; where no parameter is left, it is refused."""
    model, _ = HOSTS["bert"].build()
    overrides = {"*layer.0.*": {"A": "none", "C": "vector", "E": "none"}}
    injection = peftcore.apply(model, "glora", target="query", overrides=overrides)
    first, second = injection.operators.values()
    assert dict(first.named_parameters()).keys() == {"B", "B_up", "C", "D"}
    assert len(dict(second.named_parameters())) == 8
    with pytest.raises(UnsupportedSite, match="no parameter is left"):
        peftcore.plan(nn.Sequential(nn.Embedding(5, 4)), "glora", target="0", A="none", B="none")
