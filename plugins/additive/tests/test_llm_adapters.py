"""The adapters of LLM-Adapters, presets of the serial and the parallel one: numbers of the authors' code, the modules
that it takes by default, and what cannot stand in front of a matrix."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from adapters_package import assert_same, host, waves
from torch import Tensor

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, check_method, frozen
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "llm_adapters.json"
SERIAL = {"side": "stream", "joins": "matrix", "bias": False, "train_layer_norm": False}
PARALLEL = {"reads": "matrix", "joins": "matrix", "bias": False}
METHODS = {"llm_adapters_series": "houlsby_adapter", "llm_adapters_p": "houlsby_adapter"}
METHODS |= {"llm_adapters_parallel": "parallel_adapter"}


@pytest.mark.parametrize(("name", "method"), METHODS.items())
@against(
    "others",
    of="method",
    repository="AGI-Edgerunners/LLM-Adapters",
    commit="8166572",
    script="peft/src/peft/tuners/bottleneck.py",
)
def test_the_authors_numbers(name: str, method: str) -> None:
    """At the modules that their code takes by default, so the presets' targets are theirs."""
    model, bare = host("llama").float(), host("llama").float()
    injection = peftcore.apply(model, name, bottleneck=4)
    assert injection.method.name == method
    tensors = [p for operator in injection.operators.values() for p in operator.parameters()]
    waves(tensors, 0.2)
    assert_same(model, bare, tensors, frozen(NUMBERS)[name], abs=2e-5)


T5 = ("encoder.block.{}.layer.1", "decoder.block.{}.layer.2")
PLACES = {
    "llama": (["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"], ["model.layers.{}.mlp.down_proj"]),
    "bert": (["bert.encoder.layer.{}.intermediate.dense"], ["bert.encoder.layer.{}.output.dense"]),
    "gpt2": (["transformer.h.{}.mlp.c_fc"], ["transformer.h.{}.mlp.c_proj"]),
    "t5": (
        [f"{stack}.DenseReluDense.{name}" for stack in T5 for name in ("wi_0", "wi_1")],
        [f"{stack}.DenseReluDense.wo" for stack in T5],
    ),
}
"""The matrices in front of which an adapter stands, and those behind which, by hand."""


@pytest.mark.parametrize("name", PLACES)
def test_equation_on_hosts(name: str) -> None:
    base, inputs = HOSTS[name].build()
    base = base.double().eval().requires_grad_(False)
    model = deepcopy(base)
    injection = peftcore.apply(model, "llm_adapters_series", bottleneck=5, dtype="float64")
    fill(injection)
    before, behind = ([place.format(layer) for place in places for layer in (0, 1)] for places in PLACES[name])
    assert sorted(injection.operators) == sorted([*before, *behind])
    assert sum(p.numel() for p in injection.parameters()) == 2 * 16 * 5 * len([*before, *behind])
    unchanged = HOSTS[name].output(base(**inputs))
    for path in [*before, *behind]:
        down, up = (injection.operators[path].get_parameter(f"{part}.weight").detach() for part in ("down", "up"))

        def adapted(x: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
            return x + (x @ down.T).tanh() @ up.T

        module = base.get_submodule(path)
        if path in before:
            module.register_forward_pre_hook(lambda module, args, adapted=adapted: (adapted(args[0]), *args[1:]))
        else:
            module.register_forward_hook(lambda module, args, output, adapted=adapted: adapted(output))
    ours, expected = (HOSTS[name].output(each(**inputs)) for each in (model, base))
    assert (expected - unchanged).abs().max() > 1e-3 * unchanged.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_start_is_that_of_bert() -> None:
    """nn.init.normal of 0.02 in both matrices, `init_bert_weights` in their code."""
    for name in METHODS:
        operators = peftcore.apply(HOSTS["llama"].build()[0], name, bottleneck=512).operators.values()
        for part in ("down", "up"):
            weights = torch.cat([getattr(each, part).weight.flatten() for each in operators]).detach()
            assert abs(weights.std().item() / 0.02 - 1) < 0.03 and weights.abs().max() > 3 * 0.02


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["llm_adapters_series", "llm_adapters_p", "llm_adapters_parallel"])
def test_conformance_of_the_presets(preset: str) -> None:
    results = check_method(preset, hosts=["llama", "t5"])
    assert not [str(each) for each in results if each.status == "failed"]


@pytest.mark.parametrize("target", ["attn.q", "embed"])
def test_nothing_stands_in_front_of_a_part_of_a_matrix_or_of_tokens(target: str) -> None:
    model, _ = HOSTS["gpt2"].build()
    with pytest.raises(UnsupportedSite, match="no input that an adapter could change for it alone"):
        peftcore.apply(model, "houlsby_adapter", side="inputs", target=target)
    assert not peftcore.injections(model)


def test_a_parallel_adapter_reads_what_its_module_reads() -> None:
    """At the last matrix of a feed-forward too, where the branch's input is another."""
    llama, inputs = HOSTS["llama"].build()
    llama = llama.double().eval()
    injection = peftcore.apply(llama, "parallel_adapter", reads="matrix", bias=False, bottleneck=3, dtype="float64")
    fill(injection)
    path = "model.layers.0.mlp.down_proj"
    down, up = (injection.operators[path].get_parameter(f"{part}.weight") for part in ("down", "up"))
    module = llama.get_submodule(path)
    assert down.shape == (3, module.in_features)
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    llama(**inputs)
    x, y = seen
    torch.testing.assert_close(y, x @ module.weight.T + 4 * (x @ down.T).clamp_min(0) @ up.T)
