"""Routes whose adapters begin at some token of each row: earlier tokens are those of the base model, to the bit."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftcore
from peftcore import activate, route, using
from peftcore.errors import MissingContext, RouteError
from peftcore.testing.kit import fill

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attn_implementation="eager"))
    return model.to(dtype).eval()


def adapted(*methods: str, target: Any = None) -> tuple[nn.Module, list[peftcore.Injection]]:
    model = llama()
    found = []
    for n, method in enumerate(methods):
        options = {} if target is None else {"target": target}
        found.append(peftcore.apply(model, method, name=f"{method}{n}", dtype=torch.float64, **options))
        fill(found[-1], n)
        found[-1].trainable(True)
    return model, found


def ids(rows: int, tokens: int = 9) -> Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(3))


def in_pieces(model: nn.Module, name: str | None, row: Tensor, start: int) -> Tensor:
    """One row: first the base model on the tokens before, then the adapter on its cache."""
    cache = transformers.DynamicCache(config=model.config)
    with activate(model):
        before = model(row[None, :start], past_key_values=cache).logits if start else row.new_zeros(1, 0, 64)
    with activate(model, *([name] if name else [])):
        after = model(row[None, start:], past_key_values=cache).logits if start < len(row) else row.new_zeros(1, 0, 64)
    return torch.cat([before, after], 1)[0]


METHODS = ["lora", "dora", "ia3", "vera", "oft", "houlsby_adapter", "bitfit", "ln_tuning", "hira", "trainable_tokens"]


@pytest.mark.parametrize("method", METHODS)
def test_each_row_is_that_of_the_base_and_then_of_the_adapter_on_its_cache(method: str) -> None:
    more = {"trainable_tokens": {"token_indices": [*range(0, 64, 2)]}, "bitfit": {"add_missing_bias": True}}
    options: dict[str, Any] = more.get(method, {})
    model = llama()
    one = peftcore.apply(model, method, name="one", dtype=torch.float64, **options)
    fill(one, 1)
    two = peftcore.apply(model, "lora", name="two", dtype=torch.float64, rank=4)
    fill(two, 2)
    names, since = ["one", "two", None, "one", "one"], [4, 2, 0, 0, 9]
    rows = ids(5)
    with torch.no_grad():
        with activate(model):
            base = model(rows).logits
        expected = torch.stack(
            [in_pieces(model, name, row, start) for name, row, start in zip(names, rows, since, strict=True)]
        )
        with route(model, names, since=since):
            found = model(rows).logits
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found[0, 4:], base[0, 4:], atol=1e-3)
        for row, start in enumerate(since):
            assert torch.equal(found[row, :start], base[row, :start])
        torch.testing.assert_close(using(model, names, since=since)(model, rows).logits, expected)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients_are_those_of_the_tokens_behind(reentrant: bool | None) -> None:
    model, (one, two) = adapted("lora", "pissa", target="all-linear")
    names, since, rows = [one.name, two.name, one.name], [3, 5, 0], ids(3)
    weights = torch.randn(3, 9, 64, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        found = [parameter.grad for each in (one, two) for parameter in each.parameters()]
        model.zero_grad()
        assert all(gradient is not None and gradient.any() for gradient in found)
        return [gradient for gradient in found if gradient is not None]

    for row, (name, start) in enumerate(zip(names, since, strict=True)):
        (in_pieces(model, name, rows[row], start) * weights[row]).sum().backward()
    expected = gradients()
    if reentrant is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with route(model, names, since=since):
        (model(rows, use_cache=False).logits * weights).sum().backward()
    for actual, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_generation_goes_on_with_the_adapter_with_padding_and_beams() -> None:
    model, (one, two) = adapted("lora", "ia3")
    rows, names, since = ids(2, 7), [one.name, two.name], [4, 6]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(rows)
    mask[1, :2] = 0
    for beams in (1, 2):
        with torch.no_grad(), route(model, names, copies=beams, since=since):
            found = model.generate(rows, attention_mask=mask, num_beams=beams, **options)
            without = model.generate(rows, attention_mask=mask, num_beams=beams, use_cache=False, **options)
        assert torch.equal(found, without)
    sequences = rows
    with torch.no_grad():  # by hand, without a cache
        for _ in range(4):
            with route(model, names, since=since):
                known = torch.cat([mask, mask.new_ones(2, sequences.shape[1] - 7)], 1)
                logits = model(sequences, attention_mask=known, position_ids=(known.cumsum(1) - 1).clamp(0)).logits
            sequences = torch.cat([sequences, logits[:, -1:].argmax(-1)], 1)
    with torch.no_grad(), route(model, names, since=since):
        assert torch.equal(model.generate(rows, attention_mask=mask, **options), sequences)


def test_sixteen_adapters_share_the_cache_of_the_base_to_the_bit() -> None:
    model = llama(torch.float32)
    for n in range(16):
        fill(peftcore.apply(model, "lora", name=f"adapter{n}", target="all-linear"), n)
    names, before = [f"adapter{n}" for n in range(16)], ids(1, 1024)
    behind = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(4))
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        with activate(model):
            model(before, past_key_values=cache)
        shared = copy.deepcopy(cache)
        shared.batch_repeat_interleave(16)
        with FlopCounterMode(display=False) as together, route(model, names, since=[1024] * 16):
            found = model(behind, past_key_values=shared).logits
        apart = 0
        for row, name in enumerate(names):
            own = copy.deepcopy(cache)
            with activate(model, name), FlopCounterMode(display=False) as alone:
                logits = model(behind[row : row + 1], past_key_values=own).logits
            apart += alone.get_total_flops()
            torch.testing.assert_close(found[row], logits[0])
            for layer, base in zip(own.layers, cache.layers, strict=True):
                assert torch.equal(layer.keys[:, :, :1024], base.keys), "what the base left is what the adapter reads"
        assert together.get_total_flops() <= 1.03 * apart
        whole = torch.cat([before.expand(2, -1), behind[:2]], 1)
        with route(model, names[:2], since=[1024, 1024]):
            fresh = transformers.DynamicCache(config=model.config)
            at_once = model(whole, past_key_values=fresh).logits
        torch.testing.assert_close(at_once[:, 1024:], found[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options"), [("prefix_tuning", {}), ("llama_adapter", {}), ("prompt_tuning", {}), ("loreft", {})]
)
def test_what_does_not_act_on_each_token_by_itself_is_refused(method: str, options: dict[str, Any]) -> None:
    model = llama()
    peftcore.apply(model, method, name="whole", **options)
    with pytest.raises(RouteError):
        route(model, ["whole", None], since=[1, 0])


def test_columns_that_do_not_fit_are_refused() -> None:
    model, (one,) = adapted("lora")
    for since in ([1], [1, -1], [1, 2, 3]):
        with pytest.raises(RouteError, match="one column for each of the 2 rows"):
            route(model, [one.name, None], since=since)
    with torch.no_grad(), route(model, [one.name, None], since=[1, 0]):
        with pytest.raises(MissingContext, match="with input_ids"):
            model.model(ids(2))
        model(ids(2))


def test_what_a_call_tells_each_row_goes_with_its_tokens() -> None:
    model = llama()
    routed = peftcore.apply(model, "polytropon", name="tasks", tasks=3, dtype=torch.float64)
    fill(routed, 0)
    rows, since = ids(4), [4, 0, 2, 8]
    told = [2, 0, 1, 2]
    with torch.no_grad():
        expected = []
        for row, start in enumerate(since):
            with peftcore.call(model, task=told[row]):
                expected.append(in_pieces(model, "tasks", rows[row], start))
        with route(model, ["tasks"] * 4, since=since), peftcore.call(model, task=told):
            torch.testing.assert_close(model(rows).logits, torch.stack(expected))
