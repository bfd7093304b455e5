"""aLoRA beside peft's, with and without caches; what is decided at the prompt goes with the cache."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftcore
from peftcore import activate, call, route
from peftcore.errors import MissingContext, SequenceError, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.kit import fill

INVOCATION = [7, 5, 7]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@conformance("alora")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def llama() -> nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attn_implementation="eager"))
    return model.double().eval()


def prompts(*starts: int | None, tokens: int = 12) -> Tensor:
    """Rows of ids in which the invocation begins at some token."""
    ids = torch.randint(8, 64, (len(starts), tokens), generator=torch.Generator().manual_seed(1))
    for row, start in enumerate(starts):
        if start is not None:
            ids[row, start : start + 3] = torch.tensor(INVOCATION)
    return ids


def adapted(name: str = "judge", seed: int = 3, model: nn.Module | None = None, **options: Any) -> Any:
    model = model or llama()
    injection = peftcore.apply(
        model, "alora", name=name, rank=4, alpha=6.0, invocation=INVOCATION, dtype=torch.float64, **options
    )
    fill(injection, seed)
    injection.trainable(True)
    return model, injection


def pair() -> tuple[nn.Module, peftcore.Injection, nn.Module]:
    """Our model and peft's with equal factors."""
    model, injection = adapted(target=["q_proj", "v_proj", "up_proj"])
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "up_proj"],
        alora_invocation_tokens=INVOCATION,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(llama(), config).double().eval()
    for site, operator in zip(injection.sites, injection.operators.values(), strict=True):
        layer = theirs.base_model.model.get_submodule(site.module_path)
        layer.lora_A["default"].weight.data.copy_(operator.A)
        layer.lora_B["default"].weight.data.copy_(operator.B)
    return model, injection, theirs


@against("peft 0.21", "alora")
def test_outputs_and_gradients_are_those_of_peft() -> None:
    """Rows that begin early, late, with two occurrences, and never."""
    model, injection, theirs = pair()
    ids = prompts(2, 9, 6, None)
    ids[2, :3] = torch.tensor(INVOCATION)
    direction = torch.randn(4, 12, 64, dtype=torch.float64)
    found, wanted = model(ids).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(found, wanted)
    with activate(model):
        base = model(ids).logits
    for row, start in enumerate((2, 9, 6, 12)):
        assert torch.equal(found[row, :start], base[row, :start])
        assert start == 12 or not torch.allclose(found[row, start:], base[row, start:], atol=1e-3)
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    for site, operator in zip(injection.sites, injection.operators.values(), strict=True):
        layer = theirs.base_model.model.get_submodule(site.module_path)
        torch.testing.assert_close(operator.A.grad, layer.lora_A["default"].weight.grad)
        torch.testing.assert_close(operator.B.grad, layer.lora_B["default"].weight.grad)
        assert operator.A.grad.any() and operator.B.grad.any()


@against("peft 0.21", "alora")
def test_generated_tokens_are_those_of_peft() -> None:
    """Without a cache peft counts from an end that moves, so its first tokens of the invocation become the base's."""
    model, _, theirs = pair()
    ids = prompts(2, 7)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, **options)
    assert torch.equal(found, theirs.generate(input_ids=ids, **options))
    assert torch.equal(found, model.generate(ids, **options, use_cache=False))
    beams = model.generate(ids, **options, num_beams=3)
    assert torch.equal(beams, model.generate(ids, **options, num_beams=3, use_cache=False))


@against("peft 0.21", "alora")
def test_files_go_both_ways(tmp_path: Path) -> None:
    model, injection, theirs = pair()
    ids = prompts(3, 8)
    with torch.no_grad():
        expected = model(ids).logits
        theirs.save_pretrained(tmp_path / "theirs")
        read = peftcore.load(other := llama(), tmp_path / "theirs", name="read")
        assert read.method.name == "alora" and read.config.invocation == INVOCATION
        torch.testing.assert_close(other(ids).logits, expected)
        injection.save(tmp_path / "ours", format="peft")
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


@pytest.mark.parametrize("cut", [3, 5, 6, 7, 9])
def test_prompts_may_come_in_pieces(cut: int) -> None:
    """The invocation lies behind the cut, before it, or across it: then its first tokens ran the base."""
    model, _ = adapted()
    ids = prompts(5, 9)
    with torch.no_grad():
        whole = model(ids).logits
        cache = transformers.DynamicCache(config=model.config)
        first = model(ids[:, :cut], past_key_values=cache).logits
        if 5 < cut < 8:
            with pytest.raises(SequenceError, match=f"{cut} tokens in the cache ran without"):
                model(ids[:, cut:], past_key_values=copy.deepcopy(cache))
            with call(model, since=[cut, 9]):
                second = model(ids[:, cut:], past_key_values=cache).logits
            with route(model, ["judge", "judge"], since=[cut, 9]), call(model, since=[0, 0]):
                whole = model(ids).logits
        else:
            second = model(ids[:, cut:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_generate_may_give_the_prompt_in_pieces(size: int) -> None:
    model, _ = adapted()
    ids = prompts(2, 7, None, tokens=13)
    ids[0, 9:12] = torch.tensor(INVOCATION)  # a second time
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    whole = model.generate(ids, **options, return_dict_in_generate=True)
    pieces = model.generate(ids, **options, return_dict_in_generate=True, prefill_chunk_size=size)
    torch.testing.assert_close(torch.stack(pieces.logits), torch.stack(whole.logits))
    torch.testing.assert_close(whole.logits[0], model(ids).logits[:, -1].float())
    beams = {"num_beams": 2, "max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(model.generate(ids, **beams, prefill_chunk_size=size), model.generate(ids, **beams))


def test_the_prefix_is_the_cache_of_the_base_to_the_bit() -> None:
    """Sixteen adapters on one cache, one after the other; the first token costs what its own 16 cost."""
    model = llama().float()
    for n in range(16):
        adapted(f"judge{n}", n, model)
    before = torch.randint(8, 64, (1, 1024), generator=torch.Generator().manual_seed(2))
    behind = prompts(0, tokens=16)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), activate(model):
        model(before, past_key_values=cache)
        with FlopCounterMode(display=False) as alone:
            plain = model(behind, past_key_values=copy.deepcopy(cache)).logits
    for n in range(16):
        with torch.no_grad(), activate(model, f"judge{n}"):
            own = copy.deepcopy(cache)
            with FlopCounterMode(display=False) as flops:
                found = model(behind, past_key_values=own).logits
            assert flops.get_total_flops() <= 1.05 * alone.get_total_flops()
            for layer, base in zip(own.layers, cache.layers, strict=True):
                assert torch.equal(layer.keys[:, :, :1024], base.keys)
                assert torch.equal(layer.values[:, :, :1024], base.values)
            if n < 2:
                fresh = transformers.DynamicCache(config=model.config)
                at_once = model(torch.cat([before, behind], 1), past_key_values=fresh).logits
                torch.testing.assert_close(at_once[:, 1024:], found, rtol=1e-4, atol=1e-4)
                for layer, base in zip(fresh.layers, cache.layers, strict=True):
                    torch.testing.assert_close(layer.keys[:, :, :1024], base.keys, rtol=1e-5, atol=1e-5)
        assert (found - plain).abs().max() > 1e-3


def test_copies_of_a_cache_know_what_was_decided() -> None:
    model, _ = adapted()
    ids, more = prompts(4), torch.tensor([[9], [11]])
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        copies = copy.deepcopy(cache)
        copies.batch_repeat_interleave(2)
        found = model(more, past_key_values=copies).logits
        wanted = model(torch.cat([ids.expand(2, -1), more], 1)).logits[:, -1:]
        torch.testing.assert_close(found, wanted)
        cache.crop(-9)  # the invocation is gone
        again = prompts(4, tokens=10)[:, 3:]
        other = model(again, past_key_values=cache).logits
        torch.testing.assert_close(other, model(torch.cat([ids[:, :3], again], 1)).logits[:, 3:])


def test_rows_of_a_route_have_invocations_of_their_own() -> None:
    model, _ = adapted()
    other = peftcore.apply(model, "alora", name="other", rank=2, invocation=[5, 7], dtype=torch.float64)
    fill(other, 9)
    fill(peftcore.apply(model, "lora", name="plain", dtype=torch.float64), 10)
    ids = prompts(2, 6, None, 4)
    names = ["judge", "other", None, "plain"]
    with torch.no_grad():
        expected = []
        for row, name in enumerate(names):
            with activate(model, *([name] if name else [])):
                expected.append(model(ids[row : row + 1]).logits[0])
        with route(model, names):
            torch.testing.assert_close(model(ids).logits, torch.stack(expected))
        with route(model, names, since=[0, 0, 0, 7]):
            found = model(ids).logits
        torch.testing.assert_close(found[:3], torch.stack(expected[:3]))


def test_a_call_says_where_there_are_no_ids() -> None:
    model, _ = adapted()
    ids = prompts(4, 6)
    with torch.no_grad():
        expected = model(ids).logits
        embeds = model.get_input_embeddings()(ids)
        with pytest.raises(MissingContext, match=r"peftcore.call\(model, since="):
            model(inputs_embeds=embeds)
        with call(model, since=[4, 6]):
            torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected)


def test_a_cache_that_the_base_filled_is_gone_on_from_with_the_invocation_or_not_at_all() -> None:
    model, _ = adapted()
    ids = prompts(4)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        with activate(model):
            model(ids, past_key_values=cache)
        with pytest.raises(MissingContext, match="the 12 tokens in the cache were not searched for it"):
            model(ids[:, :1], past_key_values=copy.deepcopy(cache))
        with call(model, since=[4]):
            model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_right_padding(reentrant: bool) -> None:
    model, injection = adapted(target="all-linear")
    ids = prompts(2, 7)
    ids[0, 8:] = 0
    mask = (ids != 0).long()
    labels = ids.masked_fill(mask == 0, -100)

    def gradients() -> list[Tensor]:
        model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        found = [parameter.grad.clone() for parameter in injection.parameters()]
        model.zero_grad()
        return found

    wanted = gradients()
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for actual, each in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(actual, each)


def test_what_is_no_layer_of_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="does not act on each token independently"):
        peftcore.apply(nn.Sequential(nn.Conv2d(3, 4, 3)), "alora", target="0")
