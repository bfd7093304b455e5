"""examples/nano holds the idea of the core in 300 lines. Run on the operators of the methods, it computes the outputs
and gradients that the core computes."""

import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.testing.hosts import ALL_HOSTS

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples/nano"), str(ROOT / "tests/saved")]
from saved_adapters import HERE, Saved, difference  # noqa: E402

import peftcore_nano as nano  # noqa: E402

nano.LAYOUTS |= {Conv1D: nano.TRANSPOSED, LlamaRMSNorm: nano.AS_IT_IS}
SAVED = """
    adalora adamss adapter_soup arc attention_only bd_lora bitfit boft c3a child_tuning_d consolidator corda dare
    deft delora difffit dora dylora eva fact_tk fact_tt fish_mask fourierft frod galore glora gralora hira hra ia3
    kadaptation kasa lidb linear_probe ln_tuning locon loha lokr lora lora-bert lora-convnet lora-dit lora-mistral
    lora-mlp lora-moe lora-t5 lora-unet lora-vit lora_ga lora_one lora_plus lora_xs mica miss monteclora oft olora
    osf partial_k peanut pissa psoft pvera randlora regmean repadapter road shira spt_lora ssf svdiff
    task_arithmetic textual_inversion ties_merging tinylora trainable_tokens uni_lora vb_lora velora vera waveft xti
""".split()  # noqa: SIM905
"""The saved adapters that act on weights and biases of modules that nano knows, and on nothing else."""


def test_it_is_read_in_an_hour() -> None:
    text = (ROOT / "examples/nano/peftcore_nano.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert "import peftcore" not in text.replace("peftcore_nano", "")


class Theirs(nano.Operator):
    """The operators that the core has at the tensors of one module, each with the layout in which it wants them."""

    def __init__(self, site: nano.Site, of: dict[str, dict[str, list[Any]]]) -> None:
        super().__init__()
        self.layout, self.of = site.layout, of[site.path]

    def forward(self, weight: Tensor) -> Tensor:
        stored = self.layout.stored(weight)
        for operator, layer in self.of["weight"]:
            stored = layer.stored(operator.merged(layer.logical(stored)))
        return self.layout.logical(stored)

    def bias(self, bias: Tensor | None, weight: Tensor) -> Tensor | None:
        for operator, _ in self.of["bias"]:  # inside of the module, and so before what acts around it
            bias = operator.merged(bias)
        for operator, layer in self.of["weight"]:
            own = functools.partial(layer.logical, self.layout.stored(weight))
            bias = operator.merged_bias(bias, own)
        return bias


def operators_of(injection: peftcore.Injection) -> dict[str, dict[str, list[Any]]]:
    """The operators by module and tensor."""
    found: defaultdict[str, dict[str, list[Any]]] = defaultdict(lambda: {"weight": [], "bias": []})
    for graft in injection.grafts:
        for site in graft.holders:
            assert site.slices is None
            found[site.module_path][site.tensor].append((graft.operator, site.layer))
    return dict(found)


def outputs_and_gradients(saved: Saved, model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
    output = ALL_HOSTS[saved.host].output(model(**saved.inputs)).double()
    yield output.detach()
    torch.manual_seed(0)
    weights = torch.randn(output.shape, dtype=output.dtype)
    if parameters:
        gradients = torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True)
        yield from (torch.zeros(()) if each is None else each for each in gradients)


@pytest.mark.share(4)
@pytest.mark.parametrize("name", SAVED)
def test_it_computes_what_the_core_computes(name: str) -> None:
    saved = Saved.read(HERE / name)
    model, base = saved.base(), saved.base()
    injection = peftcore.load(model, HERE / name, trainable=True)
    operators = operators_of(injection)
    peftcore.call(model, **saved.context)
    exact = injection.method.tags.exact_gradient  # else it is another one than that of what forward computes
    parameters = [each for each in injection.parameters() if each.requires_grad and exact]
    expected = [*outputs_and_gradients(saved, model, parameters)]
    adapter = nano.apply(base, Theirs, [*operators], of=operators)
    found = [*outputs_and_gradients(saved, base, parameters)]
    assert difference(expected[0], saved.output) < 1e-6
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max().clamp(min=1e-3)
    adapter.merge()
    assert difference(next(outputs_and_gradients(saved, base, [])), expected[0]) < 1e-9


def test_it_runs_many_methods() -> None:
    assert len({name.partition("-")[0] for name in SAVED}) >= 70


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3, bias=False)
        self.picture = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.mix(self.words(ids)).tanh()
        output: Tensor = self.head(self.picture(hidden.mT).mT)
        return output


IDS = torch.tensor([[1, 4, 7], [2, 0, 10]])
TARGET = ["words", "mix", "picture", "head"]


def filled(adapter: nano.Adapter) -> nano.Adapter:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    return adapter


@pytest.mark.parametrize("method", nano.METHODS)
def test_an_adapter_lives_and_leaves_nothing(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small()
    before, state, classes = model(IDS), dict(model.named_parameters()), [type(each) for each in model.modules()]
    adapter = nano.apply(model, nano.METHODS[method], TARGET, rank=2)
    torch.testing.assert_close(model(IDS), before)
    filled(adapter)
    output = model(IDS)
    assert (output - before).abs().max() > 0.1
    output.sum().backward()
    assert all(each.grad is not None for each in adapter.parameters())
    assert all(each.grad is None and not each.requires_grad for each in state.values())
    adapter.save(tmp_path / "adapter.safetensors")
    adapter.merge()
    torch.testing.assert_close(model(IDS), output)
    adapter.unmerge()
    assert torch.equal(model(IDS), output)
    adapter.active = False
    assert torch.equal(model(IDS), before)
    adapter.remove()
    assert [type(each) for each in model.modules()] == classes
    assert all(now is state[name] and now.requires_grad for name, now in model.named_parameters())
    nano.load(model, tmp_path / "adapter.safetensors")
    assert torch.equal(model(IDS), output)


def test_two_adapters_stack_and_the_last_one_thaws_the_base() -> None:
    model = Small()
    one, two = (filled(nano.apply(model, nano.LoRA, "mix", rank=rank)) for rank in (2, 3))
    output = model(IDS)
    one.merge()
    torch.testing.assert_close(model(IDS), output)
    with pytest.raises(ValueError, match="unmerge the adapter"):
        two.merge()
    one.remove()
    assert not any(each.requires_grad for each in model.parameters())
    two.remove()
    assert all(each.requires_grad for each in model.parameters()) and type(model.mix) is nn.Linear


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    nano.apply(Small(), nano.LoRA, "mix", rank=2).save(tmp_path / "adapter.safetensors")
    other = Small()
    other.mix = nn.Linear(6, 5)
    with pytest.raises(ValueError, match="do not fit"):
        nano.load(other, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="matches no module"):
        nano.apply(other, nano.LoRA, ["mix", "nothing"])
    assert type(other.mix) is nn.Linear and all(each.requires_grad for each in other.parameters())
