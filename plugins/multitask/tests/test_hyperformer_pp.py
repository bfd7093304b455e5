"""HyperFormer and HyperFormer++: the kit; numbers of the authors' own networks and adapters for rows of two tasks; the
equation a second time in a T5, with what the kit cannot see: which sites share what; where adapters stand; how they
start; counts of the paper; what is refused. (How tasks are told: test_tasks.py.)"""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft_pairs import difference
from told_tasks import assert_beams_keep_the_tasks_of_their_rows
from torch import Tensor, nn

import peftcore
from peftcore.author import Replacement
from peftcore.errors import ConfigError
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

SMALL = {"tasks": 3, "bottleneck": 2, "task_width": 4, "hidden": 5, "code": 3}
NUMBERS = Path(__file__).parent / "numbers" / "hyperformer_pp.json"
CODE: Any = {"repository": "rabeehk/hyperformer", "commit": "56b0f99"}
CODE["script"] = "hyperformer/adapters/adapter_modeling.py"


KIT = {**SMALL, "bottleneck": 4, "hidden": 32, "code": 8, "task": 1, "init_std": 0.3, "gain_std": 0.3}
"""Of few hidden numbers all may be below zero for a layer, which then learns nothing; the steps of the kit are few."""


@conformance("hyperformer_pp", options={"*": KIT})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(0), sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


class Blocks(nn.Module):
    """Two layers with two places each, which double what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": _twice(), "mlp": _twice()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["mlp"](layer["attn"](x))  # type: ignore[index]
        return x


def _twice() -> nn.Linear:
    linear = nn.Linear(6, 6, bias=False).double()
    linear.weight.data = 2 * torch.eye(6, dtype=torch.float64)
    return linear


def parts(injection: Any, shared: bool) -> Iterator[list[nn.Parameter]]:
    """The parameters in the order of the authors' numbers; embeddings are rows of one of theirs, whose first place is
    behind the feed-forward."""
    table, network = injection.shared["tasks"], injection.shared.get("network/6")
    yield [table.embedding]
    if shared:
        yield [injection.shared[f"layer/{layer}"].value for layer in range(2)]
        yield [injection.shared[f"place/layers/n/{place}"].value for place in ("mlp", "attn")]
    reader = network.reader if shared else table.reader
    single = [*reader.first.parameters(), *reader.second.parameters(), *(network.norm.parameters() if shared else ())]
    for each in [network] if shared else [each.own for each in injection.operators.values()]:
        for generator in (each.down, each.down_bias, each.up, each.up_bias, each.gain, each.shift):
            single += generator.parameters()
    yield from ([each] for each in single)


@pytest.mark.parametrize("kind", ["shared", "apart"])
@against("authors", "hyperformer_pp", **CODE)
def test_numbers_of_the_authors(kind: str) -> None:
    """Output and gradients."""
    model = Blocks()
    options = {**SMALL, "shared": kind == "shared", "target": [r"layers.*.attn", r"layers.*.mlp"]}
    injection = peftcore.apply(model, "hyperformer_pp", **options, dtype="float64")
    assert [*injection.operators] == ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]
    parameters = [*parts(injection, kind == "shared")]
    with torch.no_grad():
        for index, rows in enumerate(parameters):
            values = wave(sum(row.numel() for row in rows), step=0.5 + 0.03 * index).chunk(len(rows))
            for row, value in zip(rows, values, strict=True):
                row.copy_(value.view(row.shape))
    x = wave(2, 3, 6, step=0.9).requires_grad_()
    with peftcore.call(model, task=[2, 0]):
        y = model(x)
    (y * wave(2, 3, 6, step=0.3)).sum().backward()
    found = {"y": y, "x": x.grad}
    found |= {str(index): torch.cat([row.grad.flatten() for row in rows]) for index, rows in enumerate(parameters)}
    numbers = frozen(NUMBERS)[kind]
    assert {*numbers} == {*found}
    for name, value in numbers.items():
        expected = torch.tensor(value, dtype=torch.float64)
        assert difference(found[name].flatten(), expected) < 1e-6 and (expected.any() or name == "0"), name


def t5() -> Any:
    sizes = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 12, "num_layers": 2, "vocab_size": 10}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


@against("authors", "hyperformer_pp", **CODE, part="start")
def test_start_is_the_authors() -> None:
    told, model = frozen(NUMBERS, "start"), nn.Sequential(nn.Linear(2, 200))
    options = {"tasks": 200, "bottleneck": 200, "task_width": 100, "hidden": 200, "code": 100, "target": "0"}
    injection: Any = peftcore.apply(model, "hyperformer_pp", **options)
    found = dict(injection.shared["network/200"].named_parameters())
    found["tasks"] = injection.shared["tasks"].embedding
    wide: Any = peftcore.apply(t5(), "hyperformer_pp", task_width=10_000, hidden=1, code=1)
    for kind in ("layer", "place"):
        found[kind] = torch.cat(
            [each.value for name, each in wide.shared.items() if name.startswith(f"{kind}/encoder")]
        )
    assert found.keys() == told.keys()
    for name, value in told.items():
        same_start(found[name], value)


@against("authors", "hyperformer_pp", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Networks, embeddings and all norms."""
    told, injection = frozen(NUMBERS, "trains"), peftcore.apply(t5(), "hyperformer_pp", **SMALL)
    norms = [path for path, op in injection.operators.items() if isinstance(op, Replacement)]
    assert sorted(f"{path}.weight" for path in norms) == told["others"]
    assert injection.summary().trainable - 8 * len(norms) == told["own"]


@against("authors", "hyperformer_pp", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    otherwise = {"tasks": "theirs are those of GLUE; here none is known"}
    same_defaults(peftcore.apply(t5(), "hyperformer_pp").config, frozen(NUMBERS, "defaults"), otherwise=otherwise)


def test_more_rows_than_tasks_and_one_task_for_all() -> None:
    """Weights that are made for all tasks are those that are made for one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    injection = peftcore.apply(model, "hyperformer_pp", target="0", **SMALL, dtype="float64")
    fill(injection)
    x, tasks = torch.randn(7, 6).double(), [0, 2, 1, 1, 0, 2, 2]
    with peftcore.call(model, task=tasks):
        together = model(x)
    for row, task in enumerate(tasks):
        with peftcore.call(model, task=task):
            torch.testing.assert_close(model(x[row]), together[row])
            torch.testing.assert_close(model(x)[row], together[row])


T5 = {
    "encoder": ["encoder.block.{}.layer.0.SelfAttention.o", "encoder.block.{}.layer.1.DenseReluDense.wo"],
    "decoder": ["decoder.block.{}.layer.0.SelfAttention.o", "decoder.block.{}.layer.2.DenseReluDense.wo"],
}


def test_which_adapters_share_what() -> None:
    """Encoder and decoder have networks of their own; cross-attention has no adapter, unless it is named."""
    model, _ = HOSTS["t5"].build()
    norms = sum("layer_norm" in name for name, _ in model.named_parameters())
    injection: Any = peftcore.apply(model, "hyperformer_pp", **SMALL)
    grafts = {path: op for path, op in injection.operators.items() if not isinstance(op, Replacement)}
    expected = {pattern.format(layer) for patterns in T5.values() for pattern in patterns for layer in range(2)}
    assert {*grafts} == expected
    for stack, patterns in T5.items():
        for pattern, layer in itertools.product(patterns, range(2)):
            known = grafts[pattern.format(layer)].known
            assert known.network.module is injection.shared[f"network/{stack}/block/n/16"]
            assert known.layer.module is injection.shared[f"layer/{stack}/block/n/{layer}"]
            assert known.place.module is grafts[pattern.format(0)].known.place.module
    assert len({id(each.known.place.module) for each in grafts.values()}) == 4
    assert norms == sum(isinstance(op, Replacement) for op in injection.operators.values()) > 0
    injection.remove()
    named = peftcore.apply(model, "hyperformer_pp", **SMALL, target=["decoder.block.*.EncDecAttention.o"])
    assert any("EncDecAttention" in path for path in named.operators)


@pytest.mark.parametrize("preset", ["hyperformer", "hyperformer_pp"])
def test_beams_keep_the_tasks_of_their_rows(preset: str) -> None:
    torch.manual_seed(2)
    model, inputs = HOSTS["t5"].build()
    injection = peftcore.apply(model.eval(), preset, **SMALL, train_layer_norm=False)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 1.5)
    assert_beams_keep_the_tasks_of_their_rows(model, inputs["input_ids"], [2, 0])


def test_how_it_starts_and_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(100, 100))
    x = torch.randn(3, 100)
    before = model(x)
    injection: Any = peftcore.apply(model, "hyperformer_pp", target="0", tasks=200, task=0)
    assert 1e-3 < difference(model(x), before) < 1
    injection.remove()
    exact = peftcore.apply(model, "hyperformer_pp", target="0", gain_std=0)
    assert torch.equal(model(x), before)
    exact.remove()
    with pytest.raises(ConfigError, match="bottleneck cannot change at single sites"):
        peftcore.apply(model, "hyperformer_pp", target="0", overrides={"0": {"bottleneck": 3}})
    peftcore.apply(model, "hyperformer_pp", target="0", overrides={"0": {"activation": "relu"}})
