"""LLaMA-Adapter against the real peft (one gate a layer, no tanh), and against its equation with a gate a head, written
a second time as forward hooks on a copy of the host in float64."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import HostMismatch, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS

LENGTH = 3
WIDTH = 16


@conformance("llama_adapter")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = HOSTS[name].build()
    return model.to(dtype).eval().requires_grad_(False), inputs


@torch.no_grad()
def fill(injection: peftcore.Injection) -> None:
    for parameter in injection.parameters():
        parameter.normal_(0, 0.5)


@pytest.mark.parametrize("tanh", [True, False])
@against("peft 0.21", "llama_adapter")
def test_forward_is_that_of_peft(tanh: bool) -> None:
    """There a single gate, taken as it is; here tanh of a gate a head (or the gate as it is), all of them alike: its
    gradient is the sum of theirs."""
    peft = pytest.importorskip("peft")
    base, inputs = host("llama")
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=LENGTH, adapter_layers=2)
    theirs = peft.get_peft_model(deepcopy(base), config).double().eval()
    ours = deepcopy(base)
    injection = peftcore.apply(ours, "llama_adapter", length=LENGTH, tanh=tanh, dtype="float64")
    adapted = [module for module in theirs.modules() if hasattr(module, "adaption_gate")]
    assert len(adapted) == len(injection.operators) == 2
    with torch.no_grad():
        for module, operator in zip(adapted, injection.operators.values(), strict=True):
            operator.prompt.normal_()
            operator.gate.fill_(torch.randn(()))
            module.adaption_prompt.copy_(operator.prompt[None])
            module.adaption_gate.copy_(operator.gate[0].tanh() if tanh else operator.gate[0])
    valid = inputs["attention_mask"].bool()
    plain, expected = base(**inputs).logits[valid], theirs(**inputs).logits[valid]
    assert (expected - plain).abs().max() > 1e-2
    # peft computes the softmax over the prompt in float32
    output = ours(**inputs).logits[valid]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(output)
    for each in (output, expected):
        (each * direction).sum().backward()
    for module, operator in zip(adapted, injection.operators.values(), strict=True):
        assert operator.prompt.grad.abs().max() > 1e-3 and operator.gate.grad.abs().min() > 1e-3
        torch.testing.assert_close(operator.prompt.grad, module.adaption_prompt.grad[0], rtol=1e-4, atol=1e-5)
        slope = 1 - operator.gate[0].detach().tanh() ** 2 if tanh else 1
        gate = operator.gate.grad.sum() / slope
        torch.testing.assert_close(gate, module.adaption_gate.grad.sum(), rtol=1e-4, atol=1e-5)


def by_heads(states: Tensor, heads: int) -> Tensor:
    return states.unflatten(-1, (heads, -1)).transpose(-3, -2)


# Host: places, heads, key heads, what makes queries, keys and values of the attention's input, and the output matrix.
Maps = dict[str, Callable[[Any, Tensor], Tensor]]
LLAMA: Maps = {
    "q": lambda module, x: module.q_proj(x),
    "k": lambda module, x: module.k_proj(x),
    "v": lambda module, x: module.v_proj(x),
    "o": lambda module, x: module.o_proj.weight @ x.mT,
}
GPT2: Maps = {
    "q": lambda module, x: module.c_attn(x)[..., :WIDTH],
    "k": lambda module, x: module.c_attn(x)[..., WIDTH : 2 * WIDTH],
    "v": lambda module, x: module.c_attn(x)[..., 2 * WIDTH :],
    "o": lambda module, x: module.c_proj.weight.T @ x.mT,
}
BERT: Maps = {
    "q": lambda module, x: module.query(x),
    "k": lambda module, x: module.key(x),
    "v": lambda module, x: module.value(x),
    "o": lambda module, x: x.mT,
}
T5: Maps = {
    "q": lambda module, x: module.q(x),
    "k": lambda module, x: module.k(x),
    "v": lambda module, x: module.v(x),
    "o": lambda module, x: module.o.weight @ x.mT,
}
CASES: dict[str, tuple[list[str], int, int, float, Maps]] = {
    "llama": (["model.layers.{}.self_attn"], 2, 1, 8**-0.5, LLAMA),
    "gpt2": (["transformer.h.{}.attn"], 2, 2, 8**-0.5, GPT2),
    "bert": (["bert.encoder.layer.{}.attention.self"], 2, 2, 8**-0.5, BERT),
    "t5": (["encoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.0.SelfAttention"], 2, 2, 1.0, T5),
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def gated(own: dict[str, Tensor], heads: int, kv_heads: int, scale: float, maps: Maps) -> Callable[..., Any]:
    """What the output matrix makes of the gated attention to the prompt, added to what the attention returns."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        query = by_heads(maps["q"](module, x), heads)
        if "position_embeddings" in kwargs:
            query = rotate(query, *(each[:, None] for each in kwargs["position_embeddings"]))
        key, value = (by_heads(maps[part](module, own["prompt"]), kv_heads) for part in "kv")
        key, value = (each.repeat_interleave(heads // kv_heads, 0) for each in (key, value))
        scores = (query @ key.mT * scale).exp()
        mixed = scores / scores.sum(-1, keepdim=True) @ value * own["gate"].tanh()[:, None, None]
        added = maps["o"](module, mixed.transpose(1, 2).flatten(2)).mT
        return (output[0] + added, *output[1:])

    return hook


WIDE = [(name, "sdpa") for name in CASES] + [(name, "eager") for name in CASES if name != "llama"]
"""Llama's own eager function computes the softmax in float32, in a host of any dtype."""


@pytest.mark.parametrize(("name", "implementation"), WIDE)
def test_equation(name: str, implementation: str) -> None:
    """Grouped and plain heads, a fused and transposed projection, biases, a scale of one."""
    base, inputs = host(name)
    base.set_attn_implementation("sdpa")
    model = deepcopy(base)
    model.set_attn_implementation(implementation)
    injection = peftcore.apply(model, "llama_adapter", length=LENGTH, dtype="float64")
    fill(injection)
    places, heads, kv_heads, scale, maps = CASES[name]
    before = HOSTS[name].output(base(**inputs))
    copies = {}
    for place in [place.format(layer) for place in places for layer in (0, 1)]:
        operator = injection.operators[f"{place}:attention"]
        copies[place] = {key: p.detach().clone().requires_grad_() for key, p in operator.named_parameters()}
        hook = gated(copies[place], heads, kv_heads, scale, maps)
        base.get_submodule(place).register_forward_hook(hook, with_kwargs=True)
    assert len(copies) == len(injection.operators)
    ours, expected = HOSTS[name].output(model(**inputs)), HOSTS[name].output(base(**inputs))
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    for place, tensors in copies.items():
        for key, p in injection.operators[f"{place}:attention"].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_one_changes_no_bit_and_learns(name: str) -> None:
    model, inputs = host(name, torch.float32)
    before = HOSTS[name].output(model(**inputs))
    injection = peftcore.apply(model, "llama_adapter", length=LENGTH)
    assert torch.equal(HOSTS[name].output(model(**inputs)), before)
    HOSTS[name].output(model(**inputs)).square().sum().backward()
    for operator in injection.operators.values():
        assert not operator.gate.any()
        assert (operator.gate.grad.abs() > 0).all()
        assert not operator.prompt.grad.any()  # the prompt starts to learn when the gate has opened


def test_start() -> None:
    injection = peftcore.apply(host("llama")[0], "llama_adapter", length=4000)
    drawn = torch.cat([operator.prompt.flatten() for operator in injection.operators.values()]).detach()
    assert abs(drawn.std() - 1) < 0.02 and abs(drawn.mean()) < 0.02


@pytest.mark.parametrize("name", CASES)
def test_parameters(name: str) -> None:
    """k d + heads a layer, d the width of what the key matrix takes."""
    places, heads, *_ = CASES[name]
    plan = peftcore.plan(host(name)[0], "llama_adapter", length=LENGTH)
    assert plan.trainable == 2 * len(places) * (LENGTH * WIDTH + heads)


def test_top_layers_of_each_stack() -> None:
    injection = peftcore.apply(host("t5")[0], "llama_adapter", layers=1)
    places = [f"{stack}.block.1.layer.0.SelfAttention:attention" for stack in ("decoder", "encoder")]
    assert sorted(injection.operators) == places
    injection = peftcore.apply(host("llama")[0], "llama_adapter", layers=1)
    assert list(injection.operators) == ["model.layers.1.self_attn:attention"]


def test_prompts_stay_out_of_the_cache() -> None:
    model, inputs = host("llama", torch.float32)
    injection = peftcore.apply(model, "llama_adapter", length=LENGTH)
    fill(injection)
    words = {key: value[:1] for key, value in inputs.items()}
    assert model(**words, use_cache=True).cache.get_seq_length() == words["input_ids"].shape[1]
    options = {"max_new_tokens": 6, "do_sample": False}
    made = model.generate(**words, **options, use_cache=True)
    assert torch.equal(made, model.generate(**words, **options, use_cache=False))


def test_keys_of_two_matrices_are_refused() -> None:
    """Latent attention makes a key of a part by heads and a rotated part that all heads share."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    with pytest.raises(UnsupportedSite, match="by one matrix each"):
        peftcore.apply(transformers.DeepseekV3ForCausalLM(config), "llama_adapter")


def test_another_base_is_told_apart(tmp_path: Path) -> None:
    peftcore.apply(host("llama")[0], "llama_adapter").save(tmp_path)
    with pytest.raises(HostMismatch):
        peftcore.load(host("gpt2")[0], tmp_path)


def test_numbers_in_llama_are_those_of_the_authors_defaults() -> None:
    """`--adapter_layer 30 --adapter_len 10` in alpaca_finetuning_v1/finetuning.sh of OpenGVLab/LLaMA-Adapter at
    521a09d: the last 30 of LLaMA 7B's 32 layers, ten vectors and a gate a head in each; the paper's 1.2 million."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=32))
    plan = peftcore.plan(model, "llama_adapter")
    assert [site.module_path for site in plan.sites] == [f"model.layers.{layer}.self_attn" for layer in range(2, 32)]
    assert plan.trainable == 30 * (10 * 4096 + 32) == 1_229_760
