"""VL-Adapter: the kit; numbers of the authors' own adapters for rows of two tasks, for each way of sharing; where
adapters stand in the paper's own model, and its count; how they start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_pairs import difference
from sines import wave
from told_tasks import assert_beams_keep_the_tasks_of_their_rows
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import peftcore
from peftcore.author import Replacement
from peftcore.errors import MissingContext
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

KIT = {"tasks": 3, "task": 1, "bottleneck": 4}
NUMBERS = Path(__file__).parent / "numbers" / "vl_adapter.json"
CODE: Any = {"repository": "ylsung/VL_adapter", "commit": "545fcbb"}
CODE["script"] = "VL-T5/src/adapters/adapter_controller.py"
TABLES = ("down", "down_bias", "up", "up_bias")


@conformance(
    "vl_adapter",
    options={
        "*": {**KIT, "shared": "down"},
        "t5": {**KIT, "shared": "none"},
        "bert": {**KIT, "shared": "up"},
        "gpt2": {"bottleneck": 4},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Passing(nn.Linear):
    """A branch's end that leaves what it is given as it is."""

    def __init__(self) -> None:
        super().__init__(6, 6, bias=False, dtype=torch.float64)
        self.weight.data = torch.eye(6, dtype=torch.float64)


@pytest.mark.parametrize("shared", ["all", "down", "up", "none"])
@against("authors", "vl_adapter", **CODE)
def test_numbers_of_the_authors(shared: str) -> None:
    """Outputs and gradients."""
    model = nn.Sequential(Passing())
    options = {"shared": shared, "tasks": ["vqa", "nlvr", "caption"], "bottleneck": 3, "target": "0"}
    operator: Any = peftcore.apply(model, "vl_adapter", **options, dtype="float64").operators["0"]
    tensors = {name: getattr(operator, name) for name in TABLES}
    with torch.no_grad():
        for index, each in enumerate(tensors.values()):
            each.copy_(wave(each.shape, 0.5 + 0.37 * index))
    x = wave((2, 3, 6), 0.9).requires_grad_()
    with peftcore.call(model, task=["caption", "vqa"]):
        y = model(x)
    (y * wave((2, 3, 6), 0.3)).sum().backward()
    found = {"y": y, "x": x.grad, **{name: each.grad for name, each in tensors.items()}}
    numbers = frozen(NUMBERS)[shared]
    assert {*numbers} == {*found}
    for name, value in numbers.items():
        expected = torch.tensor(value, dtype=torch.float64)
        assert expected.any() and difference(found[name].flatten(), expected) < 1e-6, name


def test_whom_a_call_has_to_tell() -> None:
    """Nobody where all is shared; each where a side is not."""
    x = torch.randn(2, 6, dtype=torch.float64)
    for shared in ("all", "down"):
        model = nn.Sequential(Passing())
        fill(peftcore.apply(model, "vl_adapter", shared=shared, tasks=3, bottleneck=3, target="0", dtype="float64"))
        if shared == "all":
            model(x)
            continue
        with pytest.raises(MissingContext, match="task"):
            model(x)
        with peftcore.call(model, task=[2, 0]):
            together = model(x)
        for row, task in enumerate((2, 0)):
            with peftcore.call(model, task=task):
                torch.testing.assert_close(model(x)[row], together[row])
                torch.testing.assert_close(model(x[row]), together[row])


def bart(**options: Any) -> BartForConditionalGeneration:
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "d_model": 8, "vocab_size": 40, "max_position_embeddings": 32}
    more = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in FEW.items()}
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**{**sizes, **more, **options}))


FEW = {"attention_heads": 2, "ffn_dim": 12}
ENDS = ["self_attn.out_proj", "fc2"]


@against("authors", "vl_adapter", **CODE, part="start")
def test_start_is_the_authors() -> None:
    model = nn.Sequential(nn.Linear(2, 400))
    operator = peftcore.apply(model, "vl_adapter", target="0", bottleneck=100).operators["0"]
    for name, told in frozen(NUMBERS, "start").items():
        same_start(getattr(operator, name), told)


@against("authors", "vl_adapter", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The adapters and all norms. (The map of the visual features is not in a model of language alone.)"""
    told, injection = frozen(NUMBERS, "trains"), peftcore.apply(bart(), "vl_adapter", bottleneck=4)
    norms = [path for path, op in injection.operators.items() if isinstance(op, Replacement)]
    assert sorted(path if path.endswith("bias") else f"{path}.weight" for path in norms) == told["others"]
    adapters = [op for path, op in injection.operators.items() if path not in norms]
    assert {sum(each.numel() for each in op.parameters() if each.requires_grad) for op in adapters} == {told["adapter"]}


@against("authors", "vl_adapter", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(bart(), "vl_adapter").config, frozen(NUMBERS, "defaults"))


def test_where_adapters_stand_in_the_papers_model() -> None:
    """Behind both attentions and the feed-forward, in front of the dropout; all norms train. By hooks."""
    model = bart().double().eval()
    injection: Any = peftcore.apply(model, "vl_adapter", shared="up", tasks=2, bottleneck=3, dtype="float64")
    fill(injection)
    paths = [f"model.encoder.layers.{layer}.{end}" for layer in range(2) for end in ENDS]
    paths += [f"model.decoder.layers.0.{end}" for end in (ENDS[0], "encoder_attn.out_proj", ENDS[1])]
    adapters = {path: op for path, op in injection.operators.items() if not isinstance(op, Replacement)}
    assert {*adapters} == {*paths}
    norms = [
        name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and ".peft." not in name
    ]
    assert {path.removesuffix(".bias") for path in injection.operators} == {*paths, *norms}
    ids = torch.tensor([[1, 5, 7, 2], [3, 9, 4, 2]])
    with peftcore.call(model, task=[1, 0]):
        ours = model(input_ids=ids, decoder_input_ids=ids[:, :3]).logits
    other = bart().double().eval()
    for path, op in injection.operators.items():
        if path not in adapters:
            other.get_parameter(path if path.endswith("bias") else f"{path}.weight").data.copy_(op.value)
            continue

        def added(module: nn.Module, args: Any, h: Tensor, op: Any = op) -> Tensor:
            rows = []
            for row, task in zip(h, (1, 0), strict=True):
                inner = row @ op.down[task].T + op.down_bias[task]
                inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
                rows.append(row + inner @ op.up[0].T + op.up_bias[0])
            return torch.stack(rows)

        other.get_submodule(path).register_forward_hook(added)
    expected = other(input_ids=ids, decoder_input_ids=ids[:, :3]).logits
    assert difference(ours, expected) < 1e-10
    assert difference(bart().double().eval()(input_ids=ids, decoder_input_ids=ids[:, :3]).logits, expected) > 1e-2


def test_count_of_the_paper() -> None:
    """BART-base, a bottleneck of an eighth: 30 adapters, which with norms and the maps of the visual features (2048 and
    5 numbers a box) are the 4.18 percent of its readme; by arithmetic, beside the plan."""
    with torch.device("meta"):
        base = BartForConditionalGeneration(BartConfig.from_dict(BASE))
    plan = peftcore.plan(base, "vl_adapter")
    norms = sum(p.numel() for module in base.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters())
    assert plan.trainable == 30 * (2 * 768 * 96 + 96 + 768) + norms
    visual = 768 * (2048 + 1) + 768 * (5 + 1)
    whole = sum(p.numel() for p in base.parameters()) + 30 * (2 * 768 * 96 + 96 + 768) + visual
    assert (plan.trainable + visual) / whole == pytest.approx(0.0418, abs=5e-5)


BASE = {
    "d_model": 768,
    "vocab_size": 50265,
    **{f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in
       {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}.items()},
}  # fmt: skip


def test_beams_keep_the_tasks_of_their_rows() -> None:
    torch.manual_seed(2)
    model, inputs = HOSTS["t5"].build()
    injection = peftcore.apply(model.eval(), "vl_adapter", tasks=3, shared="none", train_layer_norm=False, bottleneck=4)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 1.5)
    assert_beams_keep_the_tasks_of_their_rows(model, inputs["input_ids"], [2, 0])


def test_how_it_starts() -> None:
    model = nn.Sequential(nn.Linear(100, 100))
    x = torch.randn(3, 100)
    before = model(x)
    operator: Any = peftcore.apply(model, "vl_adapter", target="0").operators["0"]
    assert operator.down.shape == (1, 96, 100) and operator.up.shape == (1, 100, 96)
    assert 1e-4 < difference(model(x), before) < 1
