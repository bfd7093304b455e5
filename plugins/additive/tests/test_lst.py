"""LST: numbers of the authors' ladder; its equation, written a second time in float64 and put into a copy of the host
by hooks; what reaches the backbone in backward; which tokens see which; caches."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import static_windows
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, SequenceError, TargetError, UnsupportedSite
from peftcore.testing import conformance, frozen
from peftcore.testing.hosts import HOSTS
from peftcore.testing.tools import without_fast_paths

BLOCKS = {
    "llama": "model.layers.{}",
    "bert": "bert.encoder.layer.{}",
    "gpt2": "transformer.h.{}",
    "t5": "decoder.block.{}",
    "vit": "vit.layers.{}",
    "encoder": "encoder.layers.{}",
}
CAUSAL = ("llama", "gpt2", "t5")
WIDTH, NARROW, HEADS = 16, 8, 4
TOKENS = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
"""Which tokens of the kit's batch are no padding."""


@conformance("lst", options={"*": {"reduction": 2}}, expected_failures=static_windows.REFUSED)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.fixture(autouse=True)
def plain_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's encoder takes a path of its own, on nested tensors. The kit has its own ways."""
    with nullcontext() if "check" in request.fixturenames else without_fast_paths():
        yield


def host(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    return model.double().eval().requires_grad_(False), inputs


def run(name: str, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return HOSTS[name].output(model(**inputs))


def apply(model: nn.Module, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, "lst", **{"dtype": "float64", "reduction": WIDTH // NARROW, **options})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


NAMES = {"qkv.weight": "self_attn.in_proj_weight", "qkv.bias": "self_attn.in_proj_bias"}
NAMES |= {
    f"{ours}.{kind}": f"{theirs}.{kind}"
    for ours, theirs in {
        "out": "self_attn.out_proj",
        "norm1": "norm1",
        "norm2": "norm2",
        "feed_forward.0": "linear1",
        "feed_forward.2": "linear2",
    }.items()
    for kind in ("weight", "bias")
}
"""Tensors of a side block of ours, and what torch's block calls them."""


def named(injection: peftcore.Injection) -> Iterator[tuple[str, nn.Parameter]]:
    """Our tensors by their names in the authors' stack."""
    ends = {"down.": "side_first_downsample.", "up.0.": "final_side_layer_norm.", "up.1.": "side_final_upsample."}
    for part, module in injection.shared.items():
        for name, parameter in module.named_parameters():
            layer = part.rpartition("_")[2]
            if part in ("down", "up"):
                start = next(each for each in ends if f"{part}.{name}".startswith(each))
                yield f"{part}.{name}".replace(start, ends[start]), parameter
            elif name == "gate":
                yield f"side_gate_params.{layer}", parameter
            elif name.startswith("down."):
                yield f"side_downsamples.{layer}.{name.removeprefix('down.')}", parameter
            else:
                yield f"side_block.{layer}.{NAMES[name]}", parameter


def test_the_ladder_is_the_authors() -> None:
    """Of an encoder in training: their numbers, and not what the method is checked against, since their side blocks are
    of the backbone's kind. Here it is torch's, as ours, in both. They have no norm of the model's behind theirs."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
    sizes |= {"relative_attention_num_buckets": 8, "dropout_rate": 0.0}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs = name.removeprefix("encoder.").replace("shared", "embed_tokens")
            parameter.copy_(wave(parameter.shape, theirs))
    numbers = frozen(Path(__file__).parent / "numbers" / "lst.json")
    tensors = dict(named(peftcore.apply(model, "lst", reduction=2, heads=2, dtype="float64")))
    assert tensors.keys() == numbers["gradients"].keys()
    with torch.no_grad():
        for name, parameter in tensors.items():
            parameter.copy_(wave(parameter.shape, name) / (10 if "gate" in name else 1))
    ids, found = torch.tensor([[2, 5, 3, 9, 4], [4, 10, 7, 0, 0]]), []
    model.encoder.final_layer_norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    model(input_ids=ids, attention_mask=(ids != 0).long())
    (y,) = found
    (y.square() * wave(y.shape, "direction"))[ids != 0].sum().backward()
    expected = torch.tensor(numbers["output"], dtype=torch.float64).view_as(y)
    torch.testing.assert_close(y[ids != 0], expected[ids != 0], rtol=0, atol=1e-7)
    for name, parameter in tensors.items():
        assert any(numbers["gradients"][name])
        assert parameter.grad.flatten().tolist() == pytest.approx(numbers["gradients"][name], abs=1e-7), name


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def side_block(t: dict[str, Tensor], z: Tensor, state: Tensor, seen: Tensor) -> Tensor:
    """One rung, head by head and with its own softmax."""
    mu = 1 / (1 + torch.exp(-t["gate"] / 0.1))
    z = mu * z + (1 - mu) * (state @ t["down.weight"].T + t["down.bias"])
    made = norm(z, t["norm1.weight"], t["norm1.bias"]) @ t["qkv.weight"].T + t["qkv.bias"]
    heads = []
    for head in range(HEADS):
        size = NARROW // HEADS
        q, k, v = (made[..., part * NARROW + head * size :][..., :size] for part in range(3))
        scores = (q @ k.mT / size**0.5).masked_fill(~seen, -torch.inf)
        heads.append(torch.softmax(scores, -1) @ v)
    z = z + torch.cat(heads, -1) @ t["out.weight"].T + t["out.bias"]
    inner = norm(z, t["norm2.weight"], t["norm2.bias"]) @ t["feed_forward.0.weight"].T + t["feed_forward.0.bias"]
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    return z + inner @ t["feed_forward.2.weight"].T + t["feed_forward.2.bias"]


def visible(name: str, count: int) -> Tensor:
    """[rows or 1, tokens, tokens], written down by hand."""
    real = TOKENS[:, :count] if name in ("llama", "gpt2", "bert", "encoder") else torch.ones(1, count).bool()
    seen = real[:, None, :].expand(-1, count, count)
    seen = seen & torch.ones(count, count).tril().bool() if name in CAUSAL else seen
    return seen | torch.eye(count).bool()


def expect(name: str, base: nn.Module, tensors: dict[str, dict[str, Tensor]]) -> None:
    """The whole ladder as hooks: what the first block reads, what each returns, what the last is to return."""
    first, last = (base.get_submodule(BLOCKS[name].format(index)) for index in (0, 1))
    states: list[Tensor] = []

    def before(module: nn.Module, args: Any) -> None:
        states[:] = [args[0]]

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        states.append(output[0] if isinstance(output, tuple) else output)
        if module is first:
            return output
        z = states[0] @ tensors["down"]["weight"].T + tensors["down"]["bias"]
        for index, state in enumerate(states[1:]):
            key = BLOCKS[name].format(index).replace(".", "_")
            z = side_block(tensors[key], z, state, visible(name, state.shape[1]))
        up = tensors["up"]
        y = norm(z, up["0.weight"], up["0.bias"]) @ up["1.weight"].T + up["1.bias"]
        return (y, *output[1:]) if isinstance(output, tuple) else y

    first.register_forward_pre_hook(before)
    first.register_forward_hook(after)
    last.register_forward_hook(after)


@pytest.mark.parametrize("name", BLOCKS)
def test_equation(name: str) -> None:
    base, inputs = host(name)
    model = deepcopy(base)
    injection = apply(model)
    unchanged = run(name, base, inputs)
    parts = injection.shared
    tensors = {key: {n: p.detach().clone() for n, p in part.named_parameters()} for key, part in parts.items()}
    for part in tensors.values():
        for tensor in part.values():
            tensor.requires_grad_()
    expect(name, base, tensors)
    ours, expected = run(name, model, inputs), run(name, base, inputs)
    assert (expected - unchanged).abs().max() > 1e-3 * unchanged.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for key, part in parts.items():
        for n, p in part.named_parameters():
            torch.testing.assert_close(p.grad, tensors[key][n].grad, rtol=1e-8, atol=1e-8)
    count = 3 * (WIDTH * NARROW + NARROW) + 2 * (12 * NARROW**2 + 13 * NARROW + 1) + 2 * NARROW + NARROW * WIDTH + WIDTH
    assert sum(p.numel() for p in injection.parameters()) == count


def test_backward_does_not_touch_the_backbone() -> None:
    model, inputs = host("llama")
    apply(model)
    tracked: list[bool] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: tracked.append(output.requires_grad))
    model.enable_input_require_grads()  # as those do who train with reentrant checkpoints
    model(**inputs).logits.sum().backward()
    assert tracked == [False, False]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_gradient_checkpointing_of_each_block(name: str, reentrant: bool) -> None:
    model, inputs = host(name)
    injection = apply(model)
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)  # dropout
        run(name, model, inputs).square().sum().backward()
        return [p.grad.clone() for p in injection.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()  # reentrant checkpoints need it
    assert all(torch.equal(got, want) for got, want in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, _ = host(name)
    apply(model)
    ids = torch.tensor([[7, 8, 9]])
    alone = model(input_ids=ids).logits
    padded = model(
        input_ids=torch.cat([torch.tensor([[0, 0]]), ids], 1),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 0, 0, 1, 2]]),
    ).logits
    torch.testing.assert_close(padded[:, 2:], alone)


GENERATORS = ("llama", "gpt2", "t5", "mistral")
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {"use_cache": True},
    "static": {"use_cache": True, "cache_implementation": "static"},
    "chunks": {"use_cache": True, "prefill_chunk_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_gives_what_it_gives_without_a_cache(name: str, way: str, beams: int) -> None:
    if way == "chunks" and (name == "t5" or beams > 1):
        pytest.skip("transformers prefills decoders in chunks, and without beams")
    model, inputs = host(name)
    apply(model)
    given = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    given |= {"input_ids": inputs["input_ids"].flip(1), "attention_mask": inputs["attention_mask"].flip(1)}
    if (name, way) == ("mistral", "static"):  # masks of its window alone: nothing tells which tokens before are padding
        with pytest.raises(SequenceError, match="padding"):
            model.generate(**given, **WAYS[way])
        return
    expected = model.generate(**given, use_cache=False)
    assert torch.equal(model.generate(**given, **WAYS[way]), expected)


def test_cached_logits_are_those_of_the_whole() -> None:
    model, inputs = host("llama")
    apply(model)
    ids = inputs["input_ids"]
    whole = model(input_ids=ids).logits
    cache, parts = None, []
    for piece in (ids[:, :2], ids[:, 2:3], ids[:, 3:]):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_a_cache_that_the_side_network_has_not_seen_is_refused() -> None:
    model, inputs = host("llama")
    injection = apply(model)
    with injection.disabled():
        cache = model(input_ids=inputs["input_ids"], use_cache=True).past_key_values
    with pytest.raises(SequenceError, match="5 tokens, but the side network has seen 0"):
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True)


def test_some_blocks_only() -> None:
    model, inputs = host("llama")
    injection = apply(model, target="model.layers.0")
    assert set(injection.shared) == {"down", "model_layers_0", "up"}
    ids = inputs["input_ids"]
    output = model(input_ids=ids[:, :3], use_cache=True)
    rest = model(input_ids=ids[:, 3:], past_key_values=output.past_key_values).logits
    torch.testing.assert_close(rest, model(input_ids=ids).logits[:, 3:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "options", "error", "reason"),
    [
        ("t5", {}, None, ""),
        ("t5", {"target": r"re:(en|de)coder\.block\.\d+"}, UnsupportedSite, "no stream in common"),
        ("llama", {"target": "model.layers.0.mlp"}, UnsupportedSite, "not a block"),
        ("llama", {"overrides": {"*": {"reduction": 4}}}, ConfigError, "no overrides"),
        ("convnet", {}, TargetError, "matches nothing"),
    ],
)
def test_where_it_goes(name: str, options: dict[str, Any], error: type[Exception] | None, reason: str) -> None:
    model, _ = host(name)
    attempt: Callable[[], Any] = lambda: peftcore.apply(model, "lst", **options)  # noqa: E731
    if error is None:
        assert all(site.module_path.startswith("decoder") for site in attempt().sites)
        return
    with pytest.raises(error, match=reason):
        attempt()


def test_what_else_is_adapted_inside_gets_no_gradient() -> None:
    model, inputs = host("llama")
    lora = peftcore.apply(model, "lora", dtype="float64")
    apply(model)
    model(**inputs).logits.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in lora.parameters())
