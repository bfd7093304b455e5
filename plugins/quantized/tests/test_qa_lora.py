"""QA-LoRA beside numbers of the authors' code, beside peft's forward and its equation; what its merges cost."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from equation_in_float64 import KINDS, assert_equation
from packed_bases import SCHEMES, assert_lives_on, dense, fill
from peft.tuners.lora.variants import QALoraLinearVariant
from peft_pairs import difference
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore.errors import ConfigError, MergeError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start

NUMBERS = Path(__file__).parent / "numbers" / "qa_lora.json"
RANK, ALPHA, GROUP = 3, 5.0, 4
CODE: Any = {"repository": "yuhuixu1993/qa-lora", "commit": "91604c7", "script": "peft_utils.py"}
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


def in_groups(size: int) -> dict[str, Any]:
    return {"rank": RANK, "group_size": size, "scheme_options": {"group_size": size}}


# In "moe" a large update brings experts so near each other that rounding to half precision picks another one.
@conformance(
    "qa_lora",
    options={"*": in_groups(4), "mlp": in_groups(2), "unet": in_groups(2), "moe": {**in_groups(4), "alpha": 1.0}},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


def added(packed: bool) -> tuple[Tensor, Tensor]:
    """What it adds to the output of a layer with the tensors of `wave`, and its input."""
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(12, 5)).double(), 5 * wave(2, 12, step=2.1)
    if packed:
        peftcore.quantize(host, "int4", group_size=GROUP)
    options = {**OPTIONS, "group_size": GROUP, "scheme_options": {"group_size": GROUP}, "dtype": "float64"}
    injection = peftcore.apply(host, "qa_lora", target="0", **options)
    (operator,) = injection.operators.values()
    base = host(x)
    with torch.no_grad():
        operator.A.copy_(wave(3, 3, step=1.1))
        operator.B.copy_(wave(5, 3, step=1.7))
        return host(x) - base, x


@pytest.mark.parametrize("packed", [False, True])
@against("authors", "qa_lora", **CODE)
def test_numbers_of_the_authors_code(packed: bool) -> None:
    torch.testing.assert_close(
        added(packed)[0], torch.tensor(frozen(NUMBERS), dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


@against("authors", "qa_lora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    told, host = frozen(NUMBERS, "start"), nn.Sequential(nn.Linear(20480, 16))
    (operator,) = peftcore.apply(host, "qa_lora", target="0", rank=64).operators.values()
    same_start(operator.A, told["A"])
    same_start(operator.B, told["B"])


@against("authors", "qa_lora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    sizes: Any = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 9}
    injection = peftcore.apply(LlamaForCausalLM(LlamaConfig(hidden_size=64, **sizes)), "qa_lora", rank=2)
    trained = {
        f"{path}.lora_{name}.default.weight": value.numel()
        for path, operator in injection.operators.items()
        for name, value in operator.named_parameters()
    }
    assert trained == frozen(NUMBERS, "trains")


@against("authors", "qa_lora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(nn.Sequential(nn.Linear(64, 64)), "qa_lora", target="0").config
    same_defaults(config, frozen(NUMBERS, "defaults"))


def test_peft_adds_as_many_times_more_as_there_are_groups() -> None:
    """Its own forward, which multiplies the mean by their number."""
    ours, x = added(packed=True)
    tensors = {"lora_A": (3, 3, 1.1), "lora_B": (5, 3, 1.7)}
    layer: Any = {k: {"d": SimpleNamespace(weight=wave(*v[:2], step=v[2]))} for k, v in tensors.items()}
    layer |= {"lora_dropout": {"d": nn.Identity()}, "scaling": {"d": ALPHA / RANK}, "qalora_group_size": {"d": GROUP}}
    theirs = QALoraLinearVariant.forward(SimpleNamespace(**layer, training=False, in_features=12), "d", x, 0.0 * ours)
    assert difference(theirs, 3 * ours) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """Where there are two groups, over inputs and positions; int4 written a second time."""
    width = {"linear": 12, "wide": 6, "conv1d-of-transformers": 12, "convolution": 24, "grouped": 6, "embedding": 9}
    group = next(size for size in (6, 3) if width.get(kind, 12) % size == 0 and width.get(kind, 12) > size)

    def changed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        groups = weight.detach().float().reshape(weight.shape[0], -1, group)
        low, step = groups.amin(2, keepdim=True), (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15
        rounded = (((groups - low) / step).round() - (-low / step)) * step
        delta = torch.einsum("or,rg->og", tensors["B"], tensors["A"]) * ALPHA / RANK / group
        return (rounded.double() + delta[:, :, None]).reshape(weight.shape)

    assert_equation(kind, "qa_lora", changed, **OPTIONS, group_size=group, scheme_options={"group_size": group})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_packed_bases(scheme: str, tmp_path: Path) -> None:
    assert_lives_on(scheme, "qa_lora", tmp_path, rank=4, alpha=200.0)


@pytest.mark.parametrize("group_size", [32, 64])
def test_merge_into_zeros(group_size: int) -> None:
    """Codes and scales stay, and so do the outputs; groups of several of the quantizer's do as well."""
    model, x = dense()
    injection = peftcore.apply(
        peftcore.quantize(model, "int4"), "qa_lora", target=["0", "2"], alpha=3200.0, group_size=group_size
    )
    fill(injection)
    expected, before = model(x), deepcopy(model)
    report = injection.merge(into="same")
    assert sorted(report.repacked) == ["0", "2"]
    for path, repacked in report.repacked.items():
        assert repacked.error <= 2e-6
        assert repacked.lost <= 2e-6
        old, new = before.get_submodule(path), model.get_submodule(path)
        assert torch.equal(old.codes, new.codes)
        assert difference(new.scale, old.scale) <= 2e-6
        assert difference(new.zero, old.zero) >= 1e-2
    assert difference(model(x), expected) <= 1e-5


def test_formats_without_zeros_lose_of_it() -> None:
    injection = peftcore.apply(peftcore.quantize(dense()[0], "nf4"), "qa_lora", target=["0", "2"], alpha=3200.0)
    fill(injection)
    with pytest.raises(MergeError):
        injection.merge(into="same", max_error=1e-3)
    for repacked in injection.merge(into="same").repacked.values():
        assert repacked.error >= 1e-2


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="64 inputs are not divisible by group_size=48"):
        peftcore.plan(dense()[0], "qa_lora", target="0", group_size=48)
    with pytest.raises(UnsupportedSite, match="quantize first"):
        peftcore.apply(dense()[0], "qa_lora", target="0", dropout=0.1)
    with pytest.raises(ConfigError):
        peftcore.apply(dense()[0], "qa_lora", target="0", group_size=0)


def test_dropout_is_behind_the_mean() -> None:
    """Whole groups are dropped: with groups of one value each, a mean is that value or nothing."""
    model = peftcore.quantize(nn.Sequential(nn.Linear(64, 2, bias=False)), "int4")
    with torch.no_grad():
        injection = peftcore.apply(model, "qa_lora", target="0", rank=1, alpha=1.0, dropout=0.5)
        (operator,) = injection.operators.values()
        operator.A.fill_(1.0)
        operator.B.fill_(1.0)
        x = torch.ones(200, 64)
        with injection.disabled():
            base = model.train()(x)
        assert (model(x) - base).round().unique().tolist() == [0.0, 2.0, 4.0]
