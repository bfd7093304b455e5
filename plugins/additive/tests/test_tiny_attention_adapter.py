"""Tiny attention: the kit; numbers of the authors' module; the equation in hosts of each kind, with padding and in
training; generation with its own keys and values in the cache."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import static_windows
import torch
import transformers
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, NotMergeable, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill
from peftcore.testing.tools import without_fast_paths
from peftcore_additive.tiny_attention_adapter import TinyAttention, TinyAttentionAdapterConfig

NUMBERS = Path(__file__).parent / "numbers" / "tiny_attention_adapter.json"
CODE: Any = {"repository": "cindermond/tiny-attn", "commit": "03eee7e", "script": "rewriter/model/tiny_attn.py"}
THEIRS = {"down": "linear1", "up": "linear2"}
"""The names of maps in the authors' code."""


READ = "the path of torch's attention names the matrix that it reads, and no path names its output"


@conformance(
    "tiny_attention_adapter",
    options={"*": {"width": 4, "heads": 2, "modules": 2}},
    expected_failures={**static_windows.REFUSED, "options_come_back_as_written-encoder": READ},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


@against("authors", "tiny_attention_adapter", **CODE)
def test_numbers_of_the_authors() -> None:
    """Two modules one behind the other, with padding on the left: outputs, and all gradients."""
    numbers = frozen(NUMBERS)
    layers = [
        TinyAttention(6, TinyAttentionAdapterConfig(width=4, heads=2, dropout=0.0)).double().train() for _ in range(2)
    ]
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        named = {theirs(name): tensor for name, tensor in layer.named_parameters()}
        for place, name in enumerate(sorted(named)):
            named[name].data.copy_(wave(*named[name].shape, step=0.7 + 0.3 * place + 0.11 * index))
            found[f"{index}.{name}"] = named[name]
    h = wave(2, 5, 6, step=0.9).requires_grad_()
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    y = h
    for layer in layers:
        y = y + layer(y, real[:, None, None, :] | torch.eye(5).bool()) / 2
    y = y * real[..., None]
    (y * wave(2, 5, 6, step=0.3)).sum().backward()
    compared = {"y": y, **{name: tensor.grad for name, tensor in {"h": h, **found}.items()}}
    assert compared.keys() == numbers.keys()
    for name, value in compared.items():
        assert value is not None
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value.flatten(), expected, rtol=1e-9, atol=1e-10, msg=name)


def theirs(name: str) -> str:
    return name.replace("down.", "linear1.").replace("up.", "linear2.")


# Of each host: its blocks, and the module in them behind which or in front of which the stream is that attention left.
BLOCKS = {
    "llama": "model.layers.{}",
    "gpt2": "transformer.h.{}",
    "vit": "vit.layers.{}",
    "t5": "decoder.block.{}",
    "bert": "bert.encoder.layer.{}",
    "encoder": "encoder.layers.{}",
}
BEHIND = {"bert": "attention.output.LayerNorm", "encoder": "norm1"}
IN_FRONT = {"llama": "self_attn.o_proj", "gpt2": "attn.resid_dropout", "t5": "layer.0.dropout"}
IN_FRONT |= {"vit": "attention.o_proj"}
CAUSAL = ("llama", "gpt2", "t5")
TOKENS = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
ENCODERS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()  # as the kit masks them
OPTIONS: dict[str, Any] = {"width": 4, "heads": 2, "modules": 2, "dropout": 0.0, "dtype": "float64"}


@pytest.fixture(autouse=True)
def plain_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's encoder takes a path of its own, on nested tensors. The kit has its own ways."""
    with nullcontext() if "check" in request.fixturenames else without_fast_paths():
        yield


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    if name in ("llama", "gpt2", "bert"):
        inputs["attention_mask"] = TOKENS[: len(inputs["input_ids"]), : inputs["input_ids"].shape[1]].long()
    return model.double().eval().requires_grad_(False), inputs


def added(t: dict[str, Tensor], h: Tensor, seen: Tensor) -> Tensor:
    """Both modules, head by head and with a softmax of its own."""
    start = h
    for n in range(2):
        w = {key.removeprefix(f"series.{n}."): value for key, value in t.items() if key.startswith(f"series.{n}.")}
        centred = h - h.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"] + w["norm.bias"]
        x = x @ w["down.weight"].T + w["down.bias"]
        heads, W, b = [], w["attention.in_proj_weight"], w["attention.in_proj_bias"]
        q, k, v = (x[..., 4 * i : 4 * i + 4] @ W[4 * i : 4 * i + 4].T + b[4 * i : 4 * i + 4] for i in range(3))
        for head in (slice(2), slice(2, 4)):
            scores = (q[..., head] @ k[..., head].mT / 2**0.5).masked_fill(~seen, -torch.inf)
            heads.append(torch.softmax(scores, -1) @ v[..., head])
        x = torch.cat(heads, -1) @ w["attention.out_proj.weight"].T + w["attention.out_proj.bias"]
        h = h + (x @ w["up.weight"].T + w["up.bias"]) / 2
    return h - start


def visible(name: str, count: int) -> Tensor:
    """[rows or 1, tokens, tokens], by hand."""
    real = ENCODERS if name == "encoder" else TOKENS
    real = real[:, :count] if name in ("llama", "gpt2", "bert", "encoder") else torch.ones(1, count).bool()
    seen = real[:, None, :].expand(-1, count, count)
    seen = seen & torch.ones(count, count).tril().bool() if name in CAUSAL else seen
    return seen | torch.eye(count).bool()


@pytest.mark.parametrize("name", BLOCKS)
def test_equation(name: str) -> None:
    """By hooks on another copy of the host: outputs, and the gradients of all tensors."""
    base, inputs = built(name)
    model = deepcopy(base)
    only = {"exclude": "encoder"} if name == "t5" else {}
    injection = peftcore.apply(model, "tiny_attention_adapter", **OPTIONS, **only)
    fill(injection)
    before = HOSTS[name].output(base(**inputs))
    copies = []
    for index, operator in enumerate(injection.operators.values()):
        tensors = {key: p.detach().clone().requires_grad_() for key, p in operator.named_parameters()}
        copies.append((operator, tensors))
        block = base.get_submodule(BLOCKS[name].format(index))
        if name in BEHIND:
            block.get_submodule(BEHIND[name]).register_forward_hook(
                lambda m, args, y, t=tensors: y + added(t, y, visible(name, y.shape[1]))
            )
        else:
            stream: list[Tensor] = []

            def entered(m: nn.Module, args: Any, kwargs: Any, stream: list[Tensor] = stream) -> None:
                stream[:] = [args[0] if args else kwargs["hidden_states"]]

            def left(m: nn.Module, args: Any, y: Tensor, t: Any = tensors, stream: list[Tensor] = stream) -> Tensor:
                return y + added(t, stream[0] + y, visible(name, y.shape[1]))

            block.register_forward_pre_hook(entered, with_kwargs=True)
            block.get_submodule(IN_FRONT[name]).register_forward_hook(left)
    assert len(copies) == 2
    ours, expected = HOSTS[name].output(model(**inputs)), HOSTS[name].output(base(**inputs))
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for operator, tensors in copies:
        for key, p in operator.named_parameters():
            assert tensors[key].grad is not None
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}])
def test_generation_has_earlier_keys_in_the_cache(name: str, way: dict[str, Any]) -> None:
    """The same tokens as without any cache, with padding on the left; and other ones than without the adapter."""
    model, inputs = built(name)
    injection = peftcore.apply(model, "tiny_attention_adapter", **OPTIONS)
    fill(injection, 3)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.mul_(4)
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    way = {"use_cache": True, **way}
    given |= {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**given, use_cache=False, **{k: v for k, v in way.items() if k == "num_beams"})
    assert torch.equal(model.generate(**given, **way), expected)
    with injection.disabled():
        assert not torch.equal(model.generate(**given), expected)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """Blocks that run again in backward, with the same draws of dropout, give the same gradients."""
    model, inputs = built(name)
    injection = peftcore.apply(model, "tiny_attention_adapter", **{**OPTIONS, "dropout": 0.3})
    fill(injection)
    model.train()
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(3)
        HOSTS[name].output(model(**inputs)).square().sum().backward()
        found.append([p.grad.clone() for p in injection.parameters()])
    assert all(first.abs().max() > 0 and torch.equal(first, second) for first, second in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, _ = built(name)
    fill(peftcore.apply(model, "tiny_attention_adapter", **OPTIONS))
    ids = torch.tensor([[7, 8, 9]])
    padded = model(
        input_ids=torch.cat([torch.tensor([[0, 0]]), ids], 1),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 0, 0, 1, 2]]),
    ).logits
    torch.testing.assert_close(padded[:, 2:], model(input_ids=ids).logits)


def test_dropout_acts_on_attention_weights_in_training() -> None:
    layer, h = TinyAttention(6, TinyAttentionAdapterConfig(width=4, heads=2, dropout=0.5)), torch.randn(2, 5, 6)
    seen = torch.ones(5, 5).bool()
    assert torch.equal(layer.eval()(h, seen), layer(h, seen))
    assert not torch.equal(layer.train()(h, seen), layer(h, seen))


@against("authors", "tiny_attention_adapter", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Of all tensors; the last map has a hundredth of its draw."""
    operator: Any = next(iter(peftcore.apply(built("bert")[0], "tiny_attention_adapter").operators.values()))
    layer, told = type(operator.series[0])(4200, TinyAttentionAdapterConfig(width=1400)), frozen(NUMBERS, "start")
    for name, tensor in layer.named_parameters():
        first, *more = name.split(".")
        same_start(tensor, told.pop(".".join([THEIRS.get(first, first), *more])))
    assert not told


@against("authors", "tiny_attention_adapter", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """With the head."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=11, **sizes))
    injection = peftcore.apply(model, "tiny_attention_adapter", train=["classifier"])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in injection.parameters()}
    layers: list[Any] = [each for path, each in injection.operators.items() if not path.startswith("classifier")]
    layers = [each for each in layers if list(each.parameters())]
    found = {
        f"{layer}.{theirs(name)}": list(p.shape)
        for layer, each in enumerate(layers)
        for name, p in each.series[0].named_parameters()
    }
    for name, tensor in injection.state_dict().items():
        if name.startswith("classifier"):
            head = name.removesuffix(".value")
            found[head if head.endswith("bias") else f"{head}.weight"] = list(tensor.shape)
    assert found == frozen(NUMBERS, "trains") and len(found) == len(list(injection.parameters()))


@against("authors", "tiny_attention_adapter", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(built("bert")[0], "tiny_attention_adapter").config, frozen(NUMBERS, "defaults"))


def test_an_identity_and_what_it_counts() -> None:
    """4 a d + 4 a^2 + 7 a + 3 d numbers in a layer of RoBERTa-base."""
    layer = TinyAttention(768, TinyAttentionAdapterConfig())
    assert sum(p.numel() for p in layer.parameters()) == 4 * 768 + 4 + 7 + 3 * 768 == 5387
    model, inputs = built("bert")
    before = model(**inputs)[0]
    peftcore.apply(model, "tiny_attention_adapter", out_scale=0.0)
    assert torch.equal(model(**inputs)[0], before)


def test_what_is_refused() -> None:
    model, _ = built("t5")
    with pytest.raises(UnsupportedSite, match="is not the output of a self-attention"):
        peftcore.apply(model, "tiny_attention_adapter", target="decoder.block.0.layer.1.EncDecAttention.o")
    with pytest.raises(UnsupportedSite, match="cannot be located"):
        peftcore.apply(HOSTS["dit"].build()[0], "tiny_attention_adapter")
    with pytest.raises(ConfigError, match="heads=2"):
        peftcore.apply(model, "tiny_attention_adapter", heads=2)
    model, _ = built("llama")
    injection = peftcore.apply(model, "tiny_attention_adapter")
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(MissingContext, match="by itself"):
        attention = model.model.layers[0].self_attn
        rotary = model.model.rotary_emb(torch.zeros(1, 3, 16).double(), torch.arange(3)[None])
        attention(torch.randn(1, 3, 16).double(), position_embeddings=rotary, attention_mask=None)
