"""X-LoRA: the kit; peft's, on the same LoRAs; the equation, pass by pass; generation with a cache of the first pass."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_pairs import difference
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore.errors import MissingContext, SequenceError, TrainingError, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.kit import fill

TARGET = ["q_proj", "down_proj"]
LORA = {"method": "lora", "rank": 3, "target": [f"*{name}" for name in TARGET]}


@conformance(
    "xlora",
    options={"*": {"parts": [{"method": "lora", "rank": 3}] * 2, "depth": 2, "width": 12, "dropout": 0.0}},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, use_cache=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


IDS = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(4))


def applied(model: nn.Module, **options: Any) -> Any:
    options = {"parts": [LORA, {**LORA, "rank": 2, "alpha": 5.0}, LORA], **options}
    injection = peftcore.apply(model, "xlora", dtype="float64", **options)
    fill(injection, 1)
    return injection


def layers(injection: Any) -> nn.Sequential:
    return injection.operators["model"].classifier.module  # type: ignore[no-any-return]


@pytest.mark.parametrize("layerwise", [False, True])
def test_equation(layerwise: bool) -> None:
    """By hooks on the bare model: the hidden states of one run scale the LoRAs of the next."""
    model, base = host(), host()
    injection = applied(model, layerwise=layerwise, temperature=0.4, weights=[1.0, -2.0, 0.5], scale=1.5)
    hidden = base.model(input_ids=IDS).last_hidden_state
    logits = layers(injection)(hidden).unflatten(-1, (-1, 3))
    shares = (logits / 0.4).softmax(-1)
    paths = [path for path, _ in base.named_modules() if path.endswith(tuple(TARGET))]
    for number, path in enumerate(paths):
        own = shares[:, :, number if layerwise else 0]
        parts = [part.factors() for part in injection.operators[path].parts.values()]

        def add(module: Any, args: Any, y: Tensor, own: Tensor = own, parts: Any = parts) -> Tensor:
            added = [1.5 * w * own[..., e, None] * s * (args[0] @ A.T @ B.T)
                     for e, ((A, B, s), w) in enumerate(zip(parts, (1.0, -2.0, 0.5), strict=True))]  # fmt: skip
            return y + sum(added)

        base.get_submodule(path).register_forward_hook(add)
    with torch.no_grad():
        output = model(input_ids=IDS).logits
        assert difference(output, base(input_ids=IDS).logits) < 1e-12
        assert difference(output, host()(input_ids=IDS).logits) > 1e-3


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one": ({}, {}),
    "layerwise": ({"layerwise": True}, {"layerwise_scalings": True}),
    "deep": (
        {"depth": 3, "width": 5, "dropout": 0.0, "temperature": 0.5},
        {"xlora_depth": 3, "xlora_size": 5, "xlora_dropout_p": 0.0, "softmax_temperature": 0.5},
    ),
    "raw": ({"softmax": False, "scale": 0.7}, {"enable_softmax": False, "global_scaling_weight": 0.7}),
    "top": ({"top_k": 2, "softmax_top_k": True}, {"top_k_lora": 2, "enable_softmax_topk": True}),
}


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.filterwarnings("ignore:`enable_softmax_topk`")
@pytest.mark.parametrize("train_parts", [False, True])
@pytest.mark.parametrize("case", OPTIONS)
@against("peft 0.21", "xlora")
def test_beside_peft(case: str, train_parts: bool, tmp_path: Path) -> None:
    """Outputs, and gradients of the classifier and of the LoRAs."""
    mine, theirs = OPTIONS[case]
    ours = host()
    injection = applied(ours, train_parts=train_parts, **mine)
    plain = peft.LoraConfig(r=3, lora_alpha=8, target_modules=TARGET, rank_pattern={}, task_type="CAUSAL_LM")
    other = peft.LoraConfig(r=2, lora_alpha=5, target_modules=TARGET, task_type="CAUSAL_LM")
    folders = {}
    for number, config in enumerate((plain, other, plain)):
        folders[str(number)] = str(tmp_path / str(number))
        peft.get_peft_model(host(), config).save_pretrained(folders[str(number)])
    config = peft.XLoraConfig(
        hidden_size=16, adapters=folders, task_type="CAUSAL_LM", use_trainable_adapters=train_parts, **theirs
    )
    wrapped = peft.get_peft_model(host(), config).double()
    pairs = []
    for path, operator in injection.operators.items():
        if path == "model":
            continue
        layer: Any = wrapped.base_model.lora_model.model.get_submodule(path)
        for number, part in operator.parts.items():
            A, B, _ = part.factors()
            pairs += [(A, layer.lora_A[number].weight), (B, layer.lora_B[number].weight)]
    trained = list(wrapped.base_model.internal_xlora_classifier.parameters())
    held = [*layers(injection).parameters()]
    with torch.no_grad():
        for own, their in (*pairs, *zip(held, trained, strict=True)):
            their.copy_(own)
    outputs = [model(input_ids=IDS, labels=IDS) for model in (ours, wrapped)]
    assert difference(outputs[0].logits, outputs[1].logits) < 1e-10
    assert difference(outputs[0].logits, host()(input_ids=IDS).logits) > 1e-3
    for output in outputs:
        output.loss.backward()
    for own, their in (*zip(held, trained, strict=True), *(pairs if train_parts else ())):
        assert difference(own.grad, their.grad) < 1e-8 and own.grad.abs().max() > 1e-7
    assert train_parts or not any(own.requires_grad for own, _ in pairs)


@pytest.mark.parametrize("way", ["greedy", "beams", "static", "left"])
def test_a_cache_changes_nothing(way: str) -> None:
    """Peft refuses caches: what adapted forwards cached is not what its first pass would."""
    model = host()
    injection = applied(model, layerwise=True)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter *= 4
    ids = IDS.clone()
    told: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    if way == "beams":
        told |= {"num_beams": 3}
    if way == "left":
        ids[0, :3] = 0
    told["attention_mask"] = ids.ne(0).long()
    cached = {**told, "use_cache": True, **({"cache_implementation": "static"} if way == "static" else {})}
    whole = {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(ids, **told, **whole, use_cache=False)
    found = model.generate(ids, **cached, **whole)
    assert torch.equal(found.sequences, plain.sequences)  # and the logits, for few tokens could hide a wrong cache
    assert difference(torch.stack(found.logits), torch.stack(plain.logits)) < 1e-10
    assert not torch.equal(host().generate(ids, **told), plain.sequences)


def test_a_cache_in_pieces_is_that_of_the_whole() -> None:
    model = host()
    applied(model)
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        first = model(input_ids=IDS[:, :4], use_cache=True)
        rest = model(input_ids=IDS[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
    assert difference(torch.cat([first.logits, rest], 1), whole) < 1e-12


def test_a_cache_of_the_base_is_refused() -> None:
    model = host()
    injection = applied(model)
    with injection.disabled(), torch.no_grad():
        cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
    with pytest.raises(SequenceError, match="4 tokens"):
        model(input_ids=IDS[:, 4:], past_key_values=cache, use_cache=True)


def test_what_cannot_be_classified_is_refused() -> None:
    model = host()
    with pytest.raises(UnsupportedSite, match="not a product"):
        applied(model, parts=[{"method": "hra", "rank": 2}] * 2)
    with pytest.raises(UnsupportedSite, match="one stack"):
        applied(nn.Sequential(nn.Linear(4, 4)), parts=[{"method": "lora", "target": ["0"]}] * 2)
    applied(model)
    with pytest.raises(MissingContext, match="by itself"):
        model.model.layers[0].mlp(torch.zeros(1, 2, 16, dtype=torch.float64))


def test_gathered_loras_are_blended(tmp_path: Path) -> None:
    """LoRAs that were trained apart, of which the classifier alone trains on."""
    from peftcore_multitask import gather

    model = host()
    for seed, name in enumerate("ab"):
        fill(peftcore.apply(model, "lora", name=name, target=LORA["target"], dtype="float64"), seed)
    factors = [[each.factors()[:2] for each in peftcore.injections(model)[name].operators.values()] for name in "ab"]
    expected = deepcopy(factors)
    injection = gather(model, "xlora", {"a": 1.0, "b": 1.0}, name="blend", train_parts=False)
    injection.trainable()
    assert sum(parameter.numel() for parameter in injection.parameters() if parameter.requires_grad) == (16 + 1) * 2
    for number in range(2):
        own = [each.parts[str(number)].factors()[:2] for path, each in injection.operators.items() if path != "model"]
        assert all(
            torch.equal(*pair)
            for one, two in zip(own, expected[number], strict=True)
            for pair in zip(one, two, strict=True)
        )
    with torch.no_grad():
        assert difference(model(input_ids=IDS).logits, host()(input_ids=IDS).logits) > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    """Gradients are those without checkpoints; where that cannot be, it is said before anything runs on."""
    found = []
    for kind in (None, {"use_reentrant": reentrant}):
        model = host().train()
        injection = applied(model, depth=2, width=6, dropout=0.0)
        if kind is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
            model.enable_input_require_grads()
        if kind is not None and reentrant:
            with pytest.raises(TrainingError, match="use_reentrant"):
                model(input_ids=IDS, labels=IDS)
            return
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([parameter.grad for parameter in injection.parameters()])
    assert all(difference(*pair) < 1e-10 for pair in zip(*found, strict=True))


@pytest.mark.slow
def test_compiled_with_breaks() -> None:
    model = host()
    applied(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.compiler.reset()
        output = torch.compile(model, backend="eager")(input_ids=IDS).logits
    torch.compiler.reset()
    assert difference(output, expected) < 1e-12
