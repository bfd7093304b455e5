"""UniPELT: numbers of the authors' BERT, its equations written a second time in float64, what its gates see, where its
parts stand."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_equations import (
    ATTENTIONS,
    FEED_FORWARDS,
    LAYERS,
    TINY,
    Place,
    Tensors,
    assert_frozen,
    attention_by,
    compare,
    copies,
    fill,
    host,
    in_front,
    prefix,
    waves,
)
from torch import Tensor, nn

import peftcore
from peftcore.errors import MissingContext, NotMergeable, TargetError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS

LENGTH = 4
NUMBERS = Path(__file__).parent / "numbers" / "unipelt.json"
CODE: Any = {
    "repository": "morningmoni/UniPELT",
    "commit": "53d3c35",
    "script": "transformers/models/bert/modeling_bert.py",
}


@conformance("unipelt", options={"unet": {"rank": 6}})  # 32 tokens of rank 8 would be as large as a matrix there
def test_conformance(check: Callable[[], None]) -> None:
    check()


def apply(model: nn.Module, **options: Any) -> peftcore.Injection:
    options = {"rank": 3, "prefix_length": LENGTH, "prefix_mid_dim": 6, "adapter_reduction": 4, **options}
    injection = peftcore.apply(model, "unipelt", dtype="float64", **options)
    fill(injection)
    return injection


NAMES = {"down": "adapter_down.0", "up": "adapter_up", "A": "lora_A", "B": "lora_B"}
"""Modules and tensors of ours, and what the authors call them; a gate is called by what is behind it."""


def places(injection: peftcore.Injection, layers: int = 2, width: int = 8) -> Iterator[Place]:
    """Our tensors by their names in the authors' BERT. The last matrix of the network that makes the prefix has all
    layers below each other, of each its keys above its values."""
    whole = slice(None)
    (shared,) = injection.shared.values()
    yield shared.get_parameter("embedding.weight"), ["encoder.prefix_enc_embed.weight"], whole
    for kind in ("weight", "bias"):
        yield shared.get_parameter(f"hidden.{kind}"), [f"encoder.prefix_embed_MLP.0.{kind}"], whole
    for layer in range(layers):
        block, rows = f"encoder.layer.{layer}", slice(2 * width * layer, 2 * width * (layer + 1))
        attention, adapter = f"{block}.attention.self", f"{block}.output.adapters.own"
        for kind in ("weight", "bias"):
            network = injection.operators[f"{attention}:attention"]
            yield network.get_parameter(f"out.{kind}"), [f"encoder.prefix_embed_MLP.2.{kind}"], rows
        for part in ("query", "value"):
            for name, parameter in injection.operators[f"{attention}.{part}"].named_parameters():
                first, _, last = name.replace(".linear", "").partition(".")
                own = {"prefix_gate": f"{attention}.prefix_gate", "gate": f"{attention}.{part}.lora_gate"}
                theirs = own.get(first, f"{attention}.{part}.{NAMES.get(first)}")
                yield parameter, [f"{theirs}.{last}".rstrip(".")], whole
        for name, parameter in injection.operators[f"{block}.output.dense"].named_parameters():
            first, _, last = name.replace(".linear", "").partition(".")
            yield parameter, [f"{adapter}.{NAMES.get(first, first)}.{last}"], whole


@against("authors", "unipelt", **CODE)
def test_the_authors_numbers() -> None:
    """Of rows without padding, in training."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**TINY, layer_norm_eps=1e-5)
    model = waves(transformers.BertModel(config, add_pooling_layer=False))
    options: dict[str, Any] = {"rank": 3, "prefix_length": 3, "prefix_mid_dim": 6, "adapter_reduction": 2}
    injection = peftcore.apply(model, "unipelt", gate="sequence", dtype="float64", **options)
    ids = torch.tensor([[2, 5, 3, 9, 4], [4, 10, 7, 1, 6]])
    assert_frozen(model, {"input_ids": ids}, places(injection), frozen(NUMBERS))


def opened(x: Tensor, tensors: Tensors, gate: str, sequence: Tensor | None) -> Tensor:
    """g of each token, or the mean over the tokens that are none of padding: ``[rows, tokens or 1, 1]``."""
    scores = (x * tensors[f"{gate}.linear.weight"][0]).sum(-1) + tensors[f"{gate}.linear.bias"]
    gates = 1 / (1 + torch.exp(-scores))
    if sequence is None:
        return gates[..., None]
    return torch.stack([row[kept].mean() for row, kept in zip(gates, sequence.bool(), strict=True)])[:, None, None]


# Where the adapter of each of `FEED_FORWARDS` reads and adds: the norm that ends the block, or the block.
STREAMS = {
    "llama": ["model.layers.{}"],
    "bert": ["bert.encoder.layer.{}.output.LayerNorm"],
    "gpt2": ["transformer.h.{}"],
    "t5": ["encoder.block.{}", "decoder.block.{}"],
}


def expected(
    name: str, base: Any, run: Any, tensors: dict[str, Tensors], mask: Tensor | None, branch: bool = False
) -> Tensor:
    """What the host gives with the equations around its modules."""
    prefix_gates: dict[str, Tensor] = {}
    attentions = {each.path: each for layer in LAYERS for each in (a.at(layer) for a in ATTENTIONS[name])}
    hooks = []
    for attention in attentions.values():
        for part, (matrix, rows) in enumerate(zip((attention.q, attention.v), attention.rows, strict=True)):
            own = tensors[attention.operators[part + 1]]

            def update(
                module: Any,
                args: Any,
                y: Tensor,
                own: Any = own,
                rows: Any = rows,
                part: int = part,
                a: Any = attention,
            ) -> Tensor:
                (x,) = args
                if part == 0:
                    prefix_gates[a.path] = opened(x, own, "prefix_gate", mask)
                y = y.clone()
                y[..., rows] += opened(x, own, "gate", mask) * (x @ own["A"].T @ own["B"].T)
                return y

            hooks.append(base.get_submodule(f"{attention.path}.{matrix}").register_forward_hook(update))
    for layer in LAYERS:
        for (_, last), stream in zip(FEED_FORWARDS[name], STREAMS[name], strict=True):
            own = tensors[last.format(layer)]

            def adapter(module: Any, args: Any, output: Any, own: Any = own) -> Any:
                u = output[0] if isinstance(output, tuple) else output
                inner = torch.where((z := u @ own["down.weight"].T + own["down.bias"]) > 0, z, 0.0)
                added = opened(u, own, "gate", mask) * (inner @ own["up.weight"].T + own["up.bias"])
                if isinstance(module, nn.LayerNorm):
                    return nn.functional.layer_norm(args[0] + added, (16,), module.weight, module.bias, module.eps)
                return (u + added, *output[1:]) if isinstance(output, tuple) else u + added

            place = (last if branch else stream).format(layer)
            hooks.append(base.get_submodule(place).register_forward_hook(adapter))

    def edit(path: str, attend: Any, key: Tensor, value: Tensor) -> Tensor:
        own = tensors[attentions[path].operators[0]]
        stack = path.replace(".0.", ".").replace(".1.", ".").replace(".0.", ".").replace(".", "_")
        shared = tensors.get(f"shared:{stack}_{LENGTH}x6")
        front_key, front_value = prefix(own, shared, key.shape[1], LENGTH)
        gate = prefix_gates.pop(path)
        if mask is not None:
            gate = gate[..., None]
            return attend(in_front(gate * front_key, key), in_front(gate * front_value, value))
        with_prefix = attend(in_front(front_key, key), in_front(front_value, value))
        return (1 - gate[..., None]) * attend(key, value) + gate[..., None] * with_prefix

    with attention_by(base, edit):
        output = run(base)
    for hook in hooks:
        hook.remove()
    assert not prefix_gates
    return output


@pytest.mark.parametrize("mid_dim", [None, 6])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_equation_with_a_gate_for_each_token(name: str, mid_dim: int | None) -> None:
    base, _, run = host(name)
    model = deepcopy(base)
    injection = apply(model, prefix_mid_dim=mid_dim)
    plain = run(base)
    tensors = copies(injection)
    theirs = expected(name, base, run, tensors, None)
    assert (theirs - plain).abs().max() > 1e-3 * plain.abs().max()
    compare(injection, tensors, run(model), theirs)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_equation_with_an_adapter_of_the_branch(name: str) -> None:
    base, _, run = host(name)
    model = deepcopy(base)
    injection = apply(model, adapter_placement="branch")
    tensors = copies(injection)
    compare(injection, tensors, run(model), expected(name, base, run, tensors, None, branch=True))


def test_training_with_the_hosts_dropout() -> None:
    """The authors' BERT adapts the stream behind its dropout; outputs and gradients, with the same draws."""
    base, inputs, run = host("bert")
    model = deepcopy(base)
    injection = apply(model, gate="sequence")
    for each in (model, base):
        each.train()
        for path, module in each.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3 if path.endswith("output.dropout") else 0.0
    tensors = copies(injection)

    def drawn(each: Any) -> Tensor:
        torch.manual_seed(3)
        return run(each)

    theirs = expected("bert", base, drawn, tensors, inputs["attention_mask"])
    compare(injection, tensors, drawn(model), theirs)


@pytest.mark.parametrize("mid_dim", [None, 6])
def test_equation_with_a_gate_for_the_sequence(mid_dim: int | None) -> None:
    base, inputs, run = host("bert")
    model = deepcopy(base)
    injection = apply(model, prefix_mid_dim=mid_dim, gate="sequence")
    tensors = copies(injection)
    assert not inputs["attention_mask"].all()
    compare(injection, tensors, run(model), expected("bert", base, run, tensors, inputs["attention_mask"]))


def test_padding_does_not_count_in_the_mean() -> None:
    """A padded row gives what it gives alone and without padding."""
    model, inputs, run = host("bert")
    apply(model, gate="sequence")
    together = run(model)
    kept = inputs["attention_mask"][1].bool()
    alone = model(input_ids=inputs["input_ids"][1:, kept]).logits
    torch.testing.assert_close(alone[0], together[1], rtol=1e-12, atol=1e-12)


def test_the_mean_needs_to_know_the_padding() -> None:
    model, inputs, _ = host("bert")
    apply(model, gate="sequence")
    with pytest.raises(MissingContext, match="padding"):
        model.bert(**inputs)


def test_images_have_no_padding() -> None:
    model, _, run = host("vit")
    before = run(model)
    apply(model, gate="sequence")
    assert (run(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"gate": "sequence"}, {"overrides": {"*.0.*": {"gate": "sequence"}}}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_mean_is_refused_where_attention_is_causal(name: str, options: dict[str, Any]) -> None:
    model, _, run = host(name)
    before = run(model)
    with pytest.raises(UnsupportedSite, match="causal"):
        apply(model, **options)
    assert torch.equal(run(model), before)
    assert not peftcore.injections(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_is_the_same_with_and_without_a_cache(name: str) -> None:
    model, inputs, _ = host(name)
    apply(model)
    inputs = {"input_ids": inputs["input_ids"], "min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    cached, plain = (
        model.generate(**inputs, use_cache=use, output_logits=True, return_dict_in_generate=True)
        for use in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_several_act_one_inside_the_other(gate: str) -> None:
    """The inner ones run once more for each outer one, and find their gate each time."""
    model, _, run = host("bert")
    injections = [apply(model, name=name, gate=gate, seed=seed) for seed, name in enumerate("ABC")]
    before = run(model)
    injections[2].remove()
    assert (run(model) - before).abs().max() > 1e-4
    peftcore.activate(model, "A")
    alone, _, _ = host("bert")
    other = apply(alone, gate=gate)
    with torch.no_grad():
        for mine, same in zip(other.parameters(), injections[0].parameters(), strict=True):
            mine.copy_(same)
    torch.testing.assert_close(run(model), run(alone), rtol=1e-12, atol=1e-12)


# Width of the stream, of keys, and how many attentions, stacks of them and feed-forwards there are.
SIZES = {"llama": (16, 8, 2, 1, 2), "bert": (16, 16, 2, 1, 2), "gpt2": (16, 16, 2, 1, 2), "t5": (16, 16, 6, 3, 4)}


@pytest.mark.parametrize("mid_dim", [None, 7])
@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_formula(name: str, mid_dim: int | None) -> None:
    model, _, _ = host(name)
    d, keys, attentions, stacks, feed_forwards = SIZES[name]
    plan = peftcore.plan(model, "unipelt", prefix_length=5, prefix_mid_dim=mid_dim)
    lora = 8 * (d + d) + 8 * (d + keys) + 2 * (d + 1)
    own = 2 * 5 * keys if mid_dim is None else 2 * keys * (mid_dim + 1)
    shared = 0 if mid_dim is None else 5 * keys + (keys + 1) * mid_dim
    adapter = 2 * d * 1 + 1 + d + (d + 1)
    count = attentions * (lora + own + d + 1) + stacks * shared + feed_forwards * adapter
    assert plan.trainable == count
    assert (
        sum(p.numel() for p in peftcore.apply(model, "unipelt", prefix_length=5, prefix_mid_dim=mid_dim).parameters())
        == count
    )


def bert(**sizes: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model: nn.Module = transformers.BertModel(transformers.BertConfig(**{**TINY, **sizes}), add_pooling_layer=False)
    return model


@against("authors", "unipelt", **CODE, part="start")
def test_start() -> None:
    """All layers together: gates near one half, the network of the prefix as BERT's own layers, A and B as LoRA's."""
    model, told = bert(num_hidden_layers=40, hidden_size=300), frozen(NUMBERS, "start")
    options: dict[str, Any] = {"rank": 100, "prefix_length": 200, "prefix_mid_dim": 200, "adapter_reduction": 2}
    injection = peftcore.apply(model, "unipelt", **options)
    found: dict[str, list[Tensor]] = {}
    for own, (name,), _ in places(injection, 40, 300):
        found.setdefault(re.sub(r"^encoder\.layer\.\d+\.", "", name), []).append(own.detach().flatten())
    assert found.keys() == told.keys()
    for name, parts in found.items():
        same_start(torch.cat(parts), told[name])


@against("authors", "unipelt", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    options: dict[str, Any] = {"rank": 3, "prefix_length": 3, "prefix_mid_dim": 6, "adapter_reduction": 2}
    injection, sizes = peftcore.apply(bert(), "unipelt", **options), Counter[str]()
    for own, (name,), _ in places(injection):
        sizes[name] += own.numel()
    assert sizes == frozen(NUMBERS, "trains")
    assert sum(value.numel() for value in injection.parameters()) == sizes.total()


@against("authors", "unipelt", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(bert(), "unipelt").config, frozen(NUMBERS, "defaults"))


def test_bottleneck_is_the_stream_by_the_reduction() -> None:
    model, _, _ = host("llama")
    plan = peftcore.plan(model, "unipelt", adapter_reduction=2)
    assert plan.shapes["model.layers.0.mlp.down_proj.down.weight"] == (8, 16)
    wide = peftcore.plan(model, "unipelt", adapter_reduction=100)
    assert wide.shapes["model.layers.0.mlp.down_proj.down.weight"] == (1, 16)


def sites(model: nn.Module, **arguments: Any) -> list[str]:
    return sorted(site.path for site in peftcore.plan(model, "unipelt", **arguments).sites)


def test_target_names_attentions_and_feed_forwards() -> None:
    """Queries and values come with their attention."""
    model, _, _ = host("llama")
    attention, block = "model.layers.1.self_attn", "model.layers.0.mlp.down_proj"
    assert sites(model, target=[attention, block]) == sorted(
        [f"{attention}:attention", f"{attention}.q_proj", f"{attention}.v_proj", block]
    )
    bert, _, _ = host("bert")
    whole = "bert.encoder.layer.1.attention"
    inside = [f"{whole}.self{end}" for end in (":attention", ".query", ".value")]
    assert sites(bert, target=whole) == sites(bert, target=f"{whole}.self") == sorted(inside)


def test_where_queries_are_excluded_the_prefix_goes_with_its_gate() -> None:
    model, _, run = host("llama")
    found = sites(model, exclude="model.layers.0.self_attn.q_proj")
    assert "model.layers.0.self_attn:attention" not in found
    assert {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn:attention"} <= set(found)
    apply(model, exclude="model.layers.0.self_attn.q_proj")
    assert torch.isfinite(run(model)).all()


def test_hosts_without_such_an_attention_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}
    convnext = transformers.ConvNextModel(transformers.ConvNextConfig(**sizes))
    with pytest.raises(TargetError):
        peftcore.apply(convnext, "unipelt")
    bloom = transformers.BloomModel(transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(UnsupportedSite, match="attention interface"):
        peftcore.apply(bloom, "unipelt")
    encoder, _ = HOSTS["encoder"].build()
    with pytest.raises(UnsupportedSite, match="no single matrix computes queries"):  # one is read, not called
        peftcore.apply(encoder, "unipelt")


def test_unknown_queries_are_refused() -> None:
    model, _, _ = host("llama")
    known = peftcore.plan(model, "unipelt").host
    unknown = known.override({"model.layers.0.self_attn.q_proj": "other"})
    with pytest.raises(UnsupportedSite, match=r"layers\.0.*queries"):
        peftcore.apply(model, "unipelt", host=unknown)


def test_cannot_be_merged() -> None:
    """The authors' LoRA writes the last gate into the weights in eval()."""
    model, _, _ = host("llama")
    with pytest.raises(NotMergeable, match="unipelt"):
        apply(model).merge()


def test_gates_are_those_of_the_models_tokens_beside_prompts_that_go_through_the_same_matrix() -> None:
    """GPT-2 has one matrix for queries, keys and values, through which LLaMA-Adapter's prompts go once more."""
    model, inputs = HOSTS["gpt2"].build()
    model.double().eval()
    apply(model)
    alone = HOSTS["gpt2"].output(model(**inputs))
    closed = peftcore.apply(model, "llama_adapter", dtype="float64")  # its gates are zero
    torch.testing.assert_close(HOSTS["gpt2"].output(model(**inputs)), alone, rtol=1e-12, atol=1e-12)
    for operator in closed.operators.values():
        nn.init.ones_(operator.gate)
    assert not torch.allclose(HOSTS["gpt2"].output(model(**inputs)), alone)
