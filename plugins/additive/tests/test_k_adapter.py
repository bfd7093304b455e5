"""K-Adapter: numbers of the authors' RoBERTa with one chain and with two; the equation in hosts of each kind, with
padding and in training; generation with keys and values of the chain in the cache."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import static_windows
import torch
import transformers
from sines import wave, waves
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, SequenceError, TargetError, TrainingError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill
from peftcore.testing.tools import without_fast_paths

NUMBERS = Path(__file__).parent / "numbers" / "k_adapter.json"
OPTIONS: dict[str, Any] = {"width": 8, "heads": 4, "depth": 1, "dropout": 0.0, "dtype": "float64"}


@conformance(
    "k_adapter",
    options={"*": {"width": 8, "heads": 4, "depth": 1}},
    expected_failures=static_windows.REFUSED,
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.fixture(autouse=True)
def plain_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's encoder takes a path of its own, on nested tensors. The kit has its own ways."""
    with nullcontext() if "check" in request.fixturenames else without_fast_paths():
        yield


def named(injection: peftcore.Injection, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """What is asked `of` our tensors, by their names in the authors' model: their queries, keys and values are one
    matrix in ours."""
    blocks = {"out": "attention.output.dense", "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"}
    blocks |= {"feed_forward.0": "intermediate.dense", "feed_forward.2": "output.dense"}
    found = {}
    for number, part in enumerate(name for name in injection.shared if name != "joint"):
        for name, parameter in injection.shared[part].named_parameters():
            place, _, kind = name.rpartition(".")
            start, value = f"adapter.{number}", of(parameter)
            if place in ("down", "up"):
                found[f"{start}.{place}_project.{kind}"] = value
                continue
            _, depth, inner = place.split(".", 2)
            block = f"{start}.encoder.layer.{depth}"
            if inner == "qkv":
                for each, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    found[f"{block}.attention.self.{each}.{kind}"] = third
            else:
                found[f"{block}.{blocks[inner]}.{kind}"] = value
    return found


AUTHORS = {"repository": "microsoft/K-Adapter", "commit": "43651cd"}
AUTHORS["script"] = "pytorch_transformers/my_modeling_roberta.py"


@against("authors", "k_adapter", **AUTHORS)
@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_numbers_of_the_authors(fusion: Any) -> None:
    """One chain and its linear layer; two chains that are added up: here two injections. Gradients of all tensors, and
    of the words, which all states depend on."""
    numbers = frozen(NUMBERS)[fusion]
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    sizes |= {"max_position_embeddings": 16, "type_vocab_size": 1, "vocab_size": 11, "layer_norm_eps": 1e-5}
    config = transformers.RobertaConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.RobertaModel(config).double().train()
    waves(dict(model.named_parameters()), 0.4)
    options = {"layers": [0, 2], "width": 4, "heads": 2, "dropout": 0.0, "dtype": "float64"}
    names = ["fac", "lin"] if fusion == "add" else ["fac"]
    chains = [peftcore.apply(model, "k_adapter", name=name, fusion=fusion, **options) for name in names]
    model.requires_grad_(True)
    for index, chain in enumerate(chains):
        waves(named(chain, lambda p: p.data), 0.9 + index)
    if fusion == "concat":
        waves(dict(chains[0].shared["joint"].named_parameters()), 0.2)
    y = model(torch.tensor([[8, 5, 3, 9, 4], [8, 10, 7, 6, 2]])).last_hidden_state
    (y.square() * wave(y.shape, 0.3)).sum().backward()
    expect(y, numbers["output"])
    expect(model.embeddings.word_embeddings.weight.grad, numbers["words"])
    if fusion == "add":
        return
    gradients = named(chains[0], lambda p: p.grad)
    gradients |= {name: p.grad for name, p in chains[0].shared["joint"].named_parameters()}
    assert gradients.keys() == numbers["gradients"].keys()
    for name, value in gradients.items():
        assert any(numbers["gradients"][name]) != name.endswith("key.bias")  # softmax does not see these
        expect(value, numbers["gradients"][name])


@against("authors", "k_adapter", **AUTHORS)
def test_layers_of_the_authors_scripts() -> None:
    """Of 24 layers; of 12 those that are as far up."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 11}
    for script, layers in frozen(NUMBERS)["layers"].items():
        for blocks in (24, 12):
            model = transformers.RobertaModel(transformers.RobertaConfig(**sizes, num_hidden_layers=blocks))
            injection = peftcore.apply(model, "k_adapter", **OPTIONS)
            expected = [f"adapter_{layer * blocks // 24}" for layer in layers]
            assert list(injection.shared) == [*expected, "joint"], script
            operators: dict[str, Any] = injection.operators
            reading = [path for path, operator in operators.items() if operator.state is not None]
            assert reading == [f"encoder.layer.{layer * blocks // 24}" for layer in layers], script
            model(torch.tensor([[8, 5, 3]]))


def roberta(**sizes: Any) -> Any:
    common = {"num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 11, "type_vocab_size": 1}
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**common | sizes))


@against("authors", "k_adapter", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    """Of three adapters that are 768 wide, tensors of all transformer blocks together, and of the linear layer that
    reads both last states."""
    injection = peftcore.apply(roberta(hidden_size=64, num_hidden_layers=3), "k_adapter", layers=[0, 1, 2], width=768)
    adapters: list[Any] = [injection.shared[f"adapter_{number}"] for number in range(3)]
    found: dict[str, list[Tensor]] = {"joint.weight": [injection.shared["joint"].weight]}
    for module in [*adapters, *(block for adapter in adapters for block in adapter.blocks)]:
        for name, parameter in module.named_parameters():
            name = "attention.bias" if name in ("qkv.bias", "out.bias") else name
            found.setdefault(name, []).append(parameter.flatten())
    told = frozen(NUMBERS, "start")
    assert {name for name in found if not name.startswith("blocks.")} - told.keys() == {"feed_forward.2.bias"}
    for name, each in told.items():
        same_start(torch.cat(found[name]), each)


@against("authors", "k_adapter", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Their chain has the head of the relations in it, here the model's."""
    model = roberta(hidden_size=8, num_hidden_layers=3)
    injection = peftcore.apply(model, "k_adapter", layers=[0, 1, 2], width=4, heads=2, train=["classifier"])
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in injection.parameters()}
    head = {
        name.removeprefix("classifier.").removesuffix(".value")
        for name in injection.state_dict()
        if "classifier" in name
    }
    head = {name if name.endswith("bias") else f"{name}.weight" for name in head}
    joint = {f"com_dense.{name}" for name, _ in injection.shared["joint"].named_parameters()}
    found = {"model": [], "chain": sorted({*named(injection, lambda p: p), *head, *joint})}
    assert found == frozen(NUMBERS, "trains")


@against("authors", "k_adapter", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    """In RoBERTa-large, which says how wide an adapter is and what it reads."""
    told = frozen(NUMBERS, "defaults")
    with torch.device("meta"):
        model = roberta(hidden_size=1024, num_hidden_layers=24)
        injection = peftcore.apply(model, "k_adapter")
    assert list(injection.shared) == [*(f"adapter_{layer}" for layer in told["layers"]), "joint"]
    assert all(injection.shared[f"adapter_{layer}"].down.out_features == told["width"] for layer in told["layers"])
    by_size = "None takes that of RoBERTa-large where the model is as large"
    same_defaults(injection.config, told, otherwise={"layers": by_size, "width": by_size})


def expect(value: Tensor | None, numbers: list[float]) -> None:
    assert value is not None
    torch.testing.assert_close(value.flatten(), torch.tensor(numbers, dtype=torch.float64), rtol=1e-8, atol=2e-9)


# Of each host: its blocks.
BLOCKS = {
    "llama": "model.layers.{}",
    "gpt2": "transformer.h.{}",
    "bert": "bert.encoder.layer.{}",
    "vit": "vit.layers.{}",
    "t5": "decoder.block.{}",
    "encoder": "encoder.layers.{}",
}
CAUSAL = ("llama", "gpt2", "t5")
REAL = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
"""Which tokens of the kit's batch are no padding."""


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    return model.double().eval().requires_grad_(False), inputs


def adapted(model: nn.Module, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, "k_adapter", **OPTIONS | options)
    fill(injection)
    return injection


def run(name: str, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return HOSTS[name].output(model(**inputs))


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def adapter(t: dict[str, Tensor], x: Tensor, seen: Tensor) -> Tensor:
    """One adapter, head by head and with a softmax of its own; `seen` [rows or 1, tokens, tokens]."""
    z = x @ t["down.weight"].T + t["down.bias"]
    w = {key.removeprefix("blocks.0."): value for key, value in t.items()}
    heads = []
    for head in range(4):
        one = [slice(8 * part + 2 * head, 8 * part + 2 * head + 2) for part in range(3)]
        q, k, v = (z @ w["qkv.weight"][rows].T + w["qkv.bias"][rows] for rows in one)
        heads.append(torch.softmax((q @ k.mT / 2**0.5).masked_fill(~seen, -torch.inf), -1) @ v)
    z = norm(z + torch.cat(heads, -1) @ w["out.weight"].T + w["out.bias"], w["norm1.weight"], w["norm1.bias"])
    inner = z @ w["feed_forward.0.weight"].T + w["feed_forward.0.bias"]
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    z = norm(z + inner @ w["feed_forward.2.weight"].T + w["feed_forward.2.bias"], w["norm2.weight"], w["norm2.bias"])
    return x + z @ t["up.weight"].T + t["up.bias"]


def visible(name: str, count: int) -> Tensor:
    """By hand: [rows or 1, tokens, tokens]."""
    real = REAL[:, :count] if name in ("llama", "gpt2", "bert", "encoder") else torch.ones(1, count).bool()
    seen = real[:, None, :].expand(-1, count, count)
    seen = seen & torch.ones(count, count).tril().bool() if name in CAUSAL else seen
    return seen | torch.eye(count).bool()


@pytest.mark.parametrize("fusion", ["concat", "add"])
@pytest.mark.parametrize("name", BLOCKS)
def test_equation(name: str, fusion: str) -> None:
    """By hooks on another copy of the host: outputs, and the gradients of all tensors."""
    base, inputs = built(name)
    model = deepcopy(base)
    injection = adapted(model, fusion=fusion)
    before = run(name, base, inputs)
    copies = {
        part: {key: p.detach().clone().requires_grad_() for key, p in module.named_parameters()}
        for part, module in injection.shared.items()
    }
    states: list[Tensor] = []

    def reads(module: nn.Module, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def joins(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        a: Any = 0
        for part, state in zip(("adapter_0", "adapter_1"), states, strict=True):
            a = adapter(copies[part], state + a, visible(name, h.shape[1]))
        states.clear()
        y = h + a
        if fusion == "concat":
            weight = copies["joint"]["weight"]
            y = h @ weight[:, : h.shape[-1]].T + a @ weight[:, h.shape[-1] :].T + copies["joint"]["bias"]
        return (y, *output[1:]) if isinstance(output, tuple) else y

    for number in (0, 1):
        base.get_submodule(BLOCKS[name].format(number)).register_forward_pre_hook(reads, with_kwargs=True)
    base.get_submodule(BLOCKS[name].format(1)).register_forward_hook(joins)
    ours, expected = run(name, model, inputs), run(name, base, inputs)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for part, tensors in copies.items():
        for key, p in injection.shared[part].named_parameters():
            assert tensors[key].grad is not None
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-7, atol=1e-9, msg=f"{part}.{key}")


def test_layers_of_their_models_how_it_starts_as_the_model_and_what_it_counts() -> None:
    """0, 11 and 22 of 24, and 768 of 1024 wide."""
    config = transformers.RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=64, vocab_size=9
    )
    with torch.device("meta"):
        model = transformers.RobertaModel(config)
    plan = peftcore.plan(model, "k_adapter")
    one = 2 * 768 * 1024 + 768 + 1024 + 2 * (12 * 768**2 + 13 * 768)
    assert plan.trainable == 3 * one + 2 * 1024**2 + 1024 == 49_349_376
    small, inputs = built("bert")
    before = run("bert", small, inputs)
    injection = peftcore.apply(small, "k_adapter", identity=True, dtype="float64", dropout=0.0)
    assert set(injection.shared) == {"adapter_0", "adapter_1", "joint"} and torch.equal(
        run("bert", small, inputs), before
    )
    part: Any = injection.shared["adapter_0"]
    assert part.blocks[0].qkv.weight.shape == (36, 12) and part.blocks[0].heads == 12 and len(part.blocks) == 2


def test_dropout_acts_at_three_places_in_training() -> None:
    model, inputs = built("bert")
    injection = adapted(model, dropout=0.5)
    still = run("bert", model, inputs)
    assert torch.equal(run("bert", model, inputs), still)
    model.train()
    assert not torch.equal(run("bert", model, inputs), run("bert", model, inputs))
    block: Any = injection.shared["adapter_1"].blocks[0]
    z, seen = torch.randn(2, 5, 8).double(), torch.ones(5, 5).bool()
    for silent in (("out",), ("feed_forward.2",), ("out", "feed_forward.2")):  # what is zero shows no drops
        other = deepcopy(block)
        for name, p in other.named_parameters():
            if name.rpartition(".")[0] in silent:
                p.data.zero_()
        assert torch.equal(other(z, seen, None), other(z, seen, None)) == (len(silent) == 2)
    block.dropout.p = 0.0
    assert torch.equal(block(z, seen, None), block(z, seen, None))


def test_gradient_reaches_what_else_is_trained_below() -> None:
    """Through the states that adapters read, and not only through the last one."""
    model, inputs = built("llama")
    lora = peftcore.apply(model, "lora", dtype="float64", target="model.layers.0.mlp.up_proj")
    injection = adapted(model, layers=[1])
    fill(lora)
    with torch.no_grad():
        injection.shared["joint"].weight[:, :16] = 0  # the last state goes nowhere
    run("llama", model, inputs).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in lora.parameters())


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_gradient_checkpointing(name: str) -> None:
    """Blocks that run again in backward, with the same draws, give the same gradients; reentrant ones are refused."""
    model, inputs = built(name)
    injection = adapted(model, dropout=0.3)
    model.train()
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        run(name, model, inputs).square().sum().backward()
        found.append([p.grad.clone() for p in injection.parameters()])
    assert all(first.abs().max() > 0 and torch.equal(first, second) for first, second in zip(*found, strict=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(TrainingError):
        run(name, model, inputs).square().sum().backward()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}])
def test_generation_has_keys_of_the_chain_in_the_cache(name: str, way: dict[str, Any]) -> None:
    """The same tokens as without any cache, with padding; and other ones than without the adapter."""
    if name == "t5" and "prefill_chunk_size" in way:
        pytest.skip("transformers prefills decoders in chunks")
    model, inputs = built(name)
    injection = adapted(model, depth=2)
    given = {key: inputs[key].flip(1) for key in ("input_ids", "attention_mask")}
    given |= {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**given, use_cache=False, **{k: v for k, v in way.items() if k == "num_beams"})
    assert torch.equal(model.generate(**given, **{"use_cache": True, **way}), expected)
    with injection.disabled():
        assert not torch.equal(model.generate(**given), expected)


def test_a_cache_that_the_chain_has_not_seen_is_refused() -> None:
    model, inputs = built("llama")
    injection = adapted(model)
    with injection.disabled():
        cache = model(input_ids=inputs["input_ids"], use_cache=True).past_key_values
    with pytest.raises(SequenceError, match="5 tokens, but the side network has seen 0"):
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    ("name", "options", "error", "reason"),
    [
        ("llama", {"layers": [0, 2]}, TargetError, "the layers of this model are 0 to 1"),
        ("llama", {"layers": [1, 1]}, ConfigError, "ascending order"),
        ("llama", {"layers": []}, ConfigError, "layers"),
        ("llama", {"fusion": "add", "identity": True}, ConfigError, "identity"),
        ("llama", {"overrides": {"*": {"width": 4}}}, ConfigError, "no overrides"),
        ("llama", {"target": "model.layers.0.mlp"}, UnsupportedSite, "not a block"),
        ("t5", {"target": r"re:(en|de)coder\.block\.\d+"}, UnsupportedSite, "no stream in common"),
        ("convnet", {}, TargetError, "matches nothing"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], error: type[Exception], reason: str) -> None:
    model, _ = built(name)
    with pytest.raises(error, match=reason):
        peftcore.apply(model, "k_adapter", **options)


def test_some_blocks_only() -> None:
    """Numbers count the targets, and the last of them has the join."""
    model, inputs = built("llama")
    injection = adapted(model, target="model.layers.0")
    assert set(injection.shared) == {"adapter_0", "joint"}
    assert [site.module_path for site in injection.sites] == ["model.layers.0"]
    assert run("llama", model, inputs).isfinite().all()
