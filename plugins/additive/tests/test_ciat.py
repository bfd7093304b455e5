"""CIAT: the kit; the equation a second time in hosts of each kind, with gradients, and in training; how it starts;
which rows it changes; where it stands; what is refused."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import NotMergeable, UnsupportedSite
from peftcore.testing import HOSTS, conformance
from peftcore.testing.kit import fill
from peftcore.testing.tools import without_fast_paths

OPTIONS: dict[str, Any] = {"reduction": 3, "dropout": 0.0, "dtype": "float64"}


@conformance("ciat", options={"*": {"reduction": 4}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


# By hand: the block; of each branch the module that reads its input, the one that returns its output, and our name.
Branch = tuple[str, str, str]
HAND: dict[str, list[tuple[str, Branch, Branch]]] = {
    "llama": [
        (
            "model.layers.{}",
            ("self_attn.q_proj", "self_attn.o_proj", "self_attn.o_proj"),
            ("mlp", "mlp.down_proj", "mlp.down_proj"),
        )
    ],
    "bert": [
        (
            "bert.encoder.layer.{}",
            ("attention.self.query", "attention.output.dropout", "attention.output.dense"),
            ("intermediate.dense", "output.dropout", "output.dense"),
        )
    ],
    "t5": [
        (
            "encoder.block.{}",
            ("layer.0.SelfAttention.q", "layer.0.dropout", "layer.0.SelfAttention.o"),
            ("layer.1.DenseReluDense", "layer.1.dropout", "layer.1.DenseReluDense.wo"),
        ),
        (
            "decoder.block.{}",
            ("layer.0.SelfAttention.q", "layer.0.dropout", "layer.0.SelfAttention.o"),
            ("layer.2.DenseReluDense", "layer.2.dropout", "layer.2.DenseReluDense.wo"),
        ),
    ],
    "vit": [
        (
            "vit.layers.{}",
            ("attention.q_proj", "attention.o_proj", "attention.o_proj"),
            ("mlp", "mlp", "mlp.fc2"),
        )
    ],
}


def adapter(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """A, written out."""
    t = {key.removeprefix("A."): value for key, value in tensors.items()}
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * t["norm.weight"] + t["norm.bias"]
    inner = x @ t["down.weight"].T + t["down.bias"]
    return (inner * (inner > 0)) @ t["up.weight"].T + t["up.bias"]


def beside(block: nn.Module, first: str, last: str, tensors: dict[str, Tensor]) -> None:
    read: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        read[:] = [args[0] if args else kwargs["hidden_states"]]

    block.get_submodule(first).register_forward_pre_hook(before, with_kwargs=True)
    block.get_submodule(last).register_forward_hook(lambda module, args, y: y + adapter(tensors, read[0]))


def in_front(block: nn.Module, tensors: dict[str, Tensor]) -> None:
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + adapter(tensors, args[0]), *args[1:]), kwargs
        h = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": h + adapter(tensors, h)}

    block.register_forward_pre_hook(before, with_kwargs=True)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", HAND)
def test_equation(name: str, training: bool) -> None:
    """Outputs, and the gradients of all tensors; in training behind the host's dropout, with the same draws."""
    torch.manual_seed(0)
    base, inputs = HOSTS[name].build()
    base.double().train(training).requires_grad_(False)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    model = deepcopy(base)
    injection = peftcore.apply(model, "ciat", **OPTIONS)
    fill(injection)
    ours_by_path, pairs = dict(injection.operators), []

    def copied(path: str) -> dict[str, Tensor]:
        operator = ours_by_path.pop(path)
        tensors = {key: p.detach().clone().requires_grad_() for key, p in operator.named_parameters()}
        pairs.extend((p, tensors[key]) for key, p in operator.named_parameters())
        return tensors

    def run(host: nn.Module) -> Tensor:
        torch.manual_seed(1)
        with without_fast_paths():
            output: Tensor = HOSTS[name].output(host(**inputs))
        return output

    before = run(base)
    for stack, *branches in HAND[name]:
        for layer in range(2):
            block = base.get_submodule(stack.format(layer))
            for first, last, matrix in branches:
                beside(block, first, last, copied(f"{stack.format(layer)}.{matrix}"))
        in_front(base.get_submodule(stack.format(0)), copied(stack.format(0)))
    assert not ours_by_path, "there is no adapter anywhere else"
    ours, theirs = run(model), run(base)
    assert (theirs - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(ours)
    for output in (ours, theirs):
        (output * direction).sum().backward()
    for mine, other in pairs:
        assert other.grad is not None and other.grad.any()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-9)


def test_dropout_acts_behind_relu_and_in_training_alone() -> None:
    model, _ = HOSTS["llama"].build()
    injection: Any = peftcore.apply(model, "ciat", dropout=0.5)
    part = injection.operators["model.layers.0"].A
    x, kept = torch.randn(2, 3, 16), []
    part.dropout.register_forward_hook(lambda module, args, y: kept.append((args[0], y)))
    operator = injection.operators["model.layers.0"]
    part.train()
    assert not torch.equal(part.added(operator, x), part.added(operator, x))
    inner, dropped = kept[0]
    assert (inner >= 0).all() and ((dropped == 0) | torch.isclose(dropped, 2 * inner)).all()
    part.eval()
    assert torch.equal(part.added(operator, x), part.added(operator, x))


def test_how_it_starts_and_what_it_counts() -> None:
    """As keras draws: uniform up to the root of 6 / (inputs + outputs). And exactly there with init="zero"."""
    model, inputs = HOSTS["bert"].build()
    model.eval()
    injection: Any = peftcore.apply(model, "ciat", reduction=2)
    for operator in injection.operators.values():
        for linear in (operator.A.down, operator.A.up):
            assert not linear.bias.any() and 0.8 * 0.5 < linear.weight.abs().max() <= (6 / 24) ** 0.5
        assert sum(p.numel() for p in operator.parameters()) == 2 * 16 * 8 + 8 + 3 * 16
    injection.remove()
    before = model(**inputs)[0]
    peftcore.apply(model, "ciat", init="zero")
    assert torch.equal(model(**inputs)[0], before)


def test_languages_of_rows() -> None:
    """A set for each pair of languages, chosen by row."""
    model, inputs = HOSTS["t5"].build()
    model.eval()
    for index, pair in enumerate(("en-de", "en-fr")):
        fill(peftcore.apply(model, "ciat", name=pair), index)
    apart = []
    for pair in ("en-de", "en-fr"):
        with peftcore.activate(model, pair):
            apart.append(model(**inputs).logits)
    with peftcore.route(model, ["en-fr", "en-de"]):
        together = model(**inputs).logits
    torch.testing.assert_close(together, torch.stack([apart[1][0], apart[0][1]]))
    assert (apart[0] - apart[1]).abs().max() > 1e-2


def test_where_it_stands_and_what_is_refused() -> None:
    model, _ = HOSTS["t5"].build()
    injection = peftcore.apply(model, "ciat", embeddings=False)
    assert len(injection.operators) == 8 and not any("EncDec" in path for path in injection.operators)
    with pytest.raises(NotMergeable):
        injection.merge()
    injection.remove()
    named = peftcore.apply(model, "ciat", target="decoder.block.0.layer.1.EncDecAttention.o")
    assert [*named.operators] == ["decoder.block.0.layer.1.EncDecAttention.o", "decoder.block.0"]
    named.remove()
    with pytest.raises(UnsupportedSite, match="embeddings=False"):
        peftcore.apply(model, "ciat", target="encoder.block.1.layer.1.DenseReluDense.wo")
    peftcore.apply(model, "ciat", target="encoder.block.1.layer.1.DenseReluDense.wo", embeddings=False)
