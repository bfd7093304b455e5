"""APT: its equation by caches of transformers, and by hooks on BERT in float64; what its gates read, with padding on
either side and in generation."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import static_windows
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import peftcore
from peftcore.errors import MissingContext, NotMergeable, UnsupportedSite
from peftcore.testing import conformance
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill
from peftcore_additive.apt import AdaptivePrefix

LENGTH = 3


@conformance(
    "apt",
    # several at once leave positions of GPT-2 for tokens; two tell themselves apart in a UNet by more than a few rows
    options={"*": {"length": 5}, "unet": {"length": 20}},
    expected_failures=static_windows.REFUSED,
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    return model.double().eval().requires_grad_(False), inputs


def adapted(model: nn.Module, **options: Any) -> tuple[peftcore.Injection, list[AdaptivePrefix]]:
    options = {"length": LENGTH, "dropout": 0.0, "dtype": "float64", **options}
    injection = peftcore.apply(model, "apt", **options)
    fill(injection)
    return injection, [each for each in injection.operators.values() if isinstance(each, AdaptivePrefix)]


def twice(prefixes: list[AdaptivePrefix]) -> list[dict[str, Tensor]]:
    """The tensors of each layer a second time, to be trained by themselves."""
    return [{k: p.detach().clone().requires_grad_() for k, p in each.named_parameters()} for each in prefixes]


def assert_same_gradients(
    prefixes: list[AdaptivePrefix], tensors: list[dict[str, Tensor]], rtol: float = 1e-8, atol: float = 1e-10
) -> None:
    for prefix, own in zip(prefixes, tensors, strict=True):
        assert set(own) == {"prefix", "token_gates", "layer_gate"}
        for name, parameter in prefix.named_parameters():
            expected = own[name].grad
            assert parameter.grad is not None and expected is not None and expected.abs().max() > 1e-5
            torch.testing.assert_close(parameter.grad, expected, rtol=rtol, atol=atol)


def gated(own: dict[str, Tensor], h: Tensor, kv_heads: int) -> list[Tensor]:
    """Keys and values of each text, ``[batch, kv_heads, length, width]``, of what the block is given at one token."""
    alpha = 1 / (1 + torch.exp(-torch.einsum("bd,kd->bk", h, own["token_gates"])))
    rows = own["layer_gate"] * torch.einsum("bk,kn->bkn", alpha, own["prefix"])
    return [part.unflatten(-1, (kv_heads, -1)).transpose(1, 2) for part in rows.chunk(2, -1)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "kv_heads"), [("gpt2", 2), ("llama", 1)])
def test_the_equation_by_a_cache(name: str, kv_heads: int, training: bool) -> None:
    """Transformers takes keys and values for each text. Those of a layer depend on what the layers below made of it, so
    they are filled in from the first layer on."""
    base, inputs = host(name)
    model = deepcopy(base).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    mask[0, :2] = 0  # padding in front of one text, and behind another
    mask[1, -1:] = 0
    first = mask.argmax(1)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    _, prefixes = adapted(model)
    tensors = twice(prefixes)
    ours = model(input_ids=ids, attention_mask=mask, position_ids=places).logits

    width = prefixes[0].geometry.head_dim
    filled = [[torch.zeros(2, kv_heads, LENGTH, width).double()] * 2 for _ in tensors]
    for layer in range(len(tensors) + 1):
        cache = DynamicCache()
        for index, (key, value) in enumerate(filled):
            cache.update(key, value, index)
        out = base(
            input_ids=ids,
            attention_mask=torch.cat([torch.ones(2, LENGTH).long(), mask], 1),
            position_ids=places + LENGTH,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        if layer < len(tensors):
            filled[layer] = gated(tensors[layer], out.hidden_states[layer][torch.arange(2), first], kv_heads)
    seen = mask.bool()
    torch.testing.assert_close(ours[seen], out.logits[seen], rtol=1e-10, atol=1e-10)
    assert (ours - base(**inputs).logits)[seen].abs().max() > 1e-2
    direction = torch.randn_like(ours[seen])
    (ours[seen] * direction).sum().backward()
    (out.logits[seen] * direction).sum().backward()
    singles = {"rtol": 1e-5, "atol": 1e-6} if name == "llama" else {}  # its norms are in float32
    assert_same_gradients(prefixes, tensors, **singles)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_equation_by_hooks_on_bert(implementation: str) -> None:
    """With gradients of what comes in: gates and attention both read it."""
    base, inputs = host("bert")
    model = deepcopy(base)
    model.set_attn_implementation(implementation)
    _, prefixes = adapted(model, behind=False)
    tensors, given = twice(prefixes), {}
    mask = inputs["attention_mask"]

    def reads(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given[layer] = args[0]

        return hook

    def attends(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            front = gated(tensors[layer], given[layer][:, 0], 2)
            texts = []
            for text in range(len(x)):  # each by itself, without its padding
                words = x[text, mask[text].bool()]
                parts = [getattr(module, part)(words).view(-1, 2, 8) for part in ("query", "key", "value")]
                key, value = (torch.cat([f[text].transpose(0, 1), p]) for f, p in zip(front, parts[1:], strict=True))
                scores = torch.einsum("qhw,khw->hqk", parts[0], key) / 8**0.5
                mixed = torch.einsum("hqk,khw->qhw", torch.softmax(scores, -1), value).flatten(1)
                texts.append(nn.functional.pad(mixed, (0, 0, 0, x.shape[1] - len(words))))
            return (torch.stack(texts), *output[1:])

        return hook

    for layer, block in enumerate(base.bert.encoder.layer):
        block.register_forward_pre_hook(reads(layer), with_kwargs=True)
        block.attention.self.register_forward_hook(attends(layer), with_kwargs=True)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    found = []
    for each in (model, base):
        x = embeds.detach().clone().requires_grad_()
        found.append((x, each(inputs_embeds=x, **rest).logits))
    (x, ours), (y, expected) = found
    seen = mask.bool() if ours.shape[:2] == mask.shape else torch.ones(ours.shape[:1], dtype=torch.bool)
    torch.testing.assert_close(ours[seen], expected[seen], rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours[seen])
    (ours[seen] * direction).sum().backward()
    (expected[seen] * direction).sum().backward()
    assert_same_gradients(prefixes, tensors)
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad[mask.bool()], y.grad[mask.bool()], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation_remembers_the_first_token(way: dict[str, Any]) -> None:
    model, _ = host("llama")
    injection, prefixes = adapted(model)
    for prefix in prefixes:
        prefix.layer_gate.data.mul_(5)
    ids, mask = torch.randint(3, 40, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    given = {"attention_mask": mask, "use_cache": True, "do_sample": False, **way}
    given |= {"max_new_tokens": 6, "min_new_tokens": 6}
    cached = model.generate(ids, **given)
    assert torch.equal(model.generate(ids, **{**given, "use_cache": False, "cache_implementation": None}), cached)
    alone = model.generate(ids[1:, 2:], **{**given, "attention_mask": mask[1:, 2:]})
    assert torch.equal(alone[0, 4:], cached[1, 6:])
    with injection.disabled():
        assert not torch.equal(model.generate(ids, **given), cached)


def test_texts_of_another_first_token_have_other_gates() -> None:
    model, inputs = host("llama")
    _, prefixes = adapted(model)
    opened: list[Tensor] = []
    prefixes[1].register_forward_hook(lambda module, args, output: opened.append(module.opened()))
    ids = inputs["input_ids"][:1].repeat(3, 1)
    ids[1, 0], ids[2, -1] = ids[0, 0] + 1, ids[0, -1] + 1
    model(input_ids=ids)
    gates = opened[0][:, 0, :, 0]
    assert gates.shape == (3, LENGTH)
    assert not torch.equal(gates[0], gates[1]) and torch.equal(gates[0], gates[2])


def test_a_fresh_gate_is_half_open() -> None:
    model, _ = host("bert")
    injection = peftcore.apply(model, "apt", length=64)
    prefix = next(each for each in injection.operators.values() if isinstance(each, AdaptivePrefix))
    assert prefix.layer_gate.item() == 1
    assert abs(prefix.token_gates.std().item() - 0.02) < 2e-3 and abs(prefix.prefix.std().item() - 1) < 0.1


@pytest.mark.parametrize(("name", "layers", "width"), [("bert", 2, 16), ("llama", 2, 8)])
def test_parameters(name: str, layers: int, width: int) -> None:
    """Streams are 16 wide, and keys half as wide in the llama."""
    model, _ = host(name)
    flat = peftcore.plan(model, "apt", length=LENGTH).trainable
    assert flat == layers * (LENGTH * (2 * width + 16) + 1)
    made = peftcore.plan(model, "apt", length=LENGTH, projection=5).trainable
    network = LENGTH * width + (width + 1) * 5
    assert made == layers * (6 * 2 * width + LENGTH * 16 + 1) + network


def test_what_it_refuses() -> None:
    model, _ = host("bert")
    injection, _ = adapted(model)
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(MissingContext, match="call its block"):
        model.bert.encoder.layer[0].attention.self(torch.randn(1, 4, 16).double())


def test_attention_within_windows_has_no_gates() -> None:
    timm = pytest.importorskip("timm")
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=16, patch_size=2, embed_dim=8, depths=(1,), num_heads=(2,), window_size=4, num_classes=3
    )
    with pytest.raises(UnsupportedSite, match=r"windows|grid|softmax"):
        peftcore.apply(model, "apt")
        model(torch.randn(2, 3, 16, 16))
