"""The parallel adapter: numbers of its authors' encoder and of the adapters package; what it reads and where it adds,
how it starts, and its equation, written a second time as hooks on a copy of the host, in float64."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from adapters_package import assert_same_adapters
from dropped_hosts import assert_same, filled, rewrite, train
from torch import Tensor, nn

import peftcore
from peftcore.author import forward_context
from peftcore.errors import NotMergeable, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.tools import without_fast_paths

NUMBERS = Path(__file__).parent / "numbers" / "adapters_package.json"
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (1 + torch.exp(2 * x)),
}

# Written down by hand: the module that reads what the block reads, the one whose output is the block's, the operator.
Places = list[tuple[str, str, str]]
FEED_FORWARDS: dict[str, Places] = {
    "llama": [("model.layers.{}.mlp", "model.layers.{}.mlp", "model.layers.{}.mlp.down_proj")],
    "bert": [
        (
            "bert.encoder.layer.{}.intermediate.dense",
            "bert.encoder.layer.{}.output.dense",
            "bert.encoder.layer.{}.output.dense",
        )
    ],
    "gpt2": [("transformer.h.{}.mlp", "transformer.h.{}.mlp", "transformer.h.{}.mlp.c_proj")],
    "t5": [
        (f"{stack}.DenseReluDense", f"{stack}.DenseReluDense", f"{stack}.DenseReluDense.wo")
        for stack in ("encoder.block.{}.layer.1", "decoder.block.{}.layer.2")
    ],
    "moe": [("model.layers.{}.mlp", "model.layers.{}.mlp", "model.layers.{}.mlp")],
    "encoder": [("encoder.layers.{}.linear1", "encoder.layers.{}.linear2", "encoder.layers.{}.linear2")],
}
ATTENTIONS: dict[str, Places] = {
    "llama": [("model.layers.{}.self_attn", "model.layers.{}.self_attn", "model.layers.{}.self_attn.o_proj")],
    "bert": [
        (
            "bert.encoder.layer.{}.attention.self",
            "bert.encoder.layer.{}.attention.output.dense",
            "bert.encoder.layer.{}.attention.output.dense",
        )
    ],
    "gpt2": [("transformer.h.{}.attn", "transformer.h.{}.attn", "transformer.h.{}.attn.c_proj")],
    "t5": [
        (f"{path}", f"{path}", f"{path}.o")
        for path in (
            "encoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.1.EncDecAttention",
        )
    ],
    "encoder": [("encoder.layers.{}.self_attn", "encoder.layers.{}.self_attn", "encoder.layers.{}.self_attn")],
}


@conformance("parallel_adapter")
def test_conformance(check: Callable[[], None]) -> None:
    check()


AUTHORS = Path(__file__).parent / "numbers" / "parallel_adapter.json"
CODE = {"repository": "jxhe/unify-parameter-efficient-tuning", "commit": "3222ce2"}
CODE["script"] = "src/transformers/models/roberta/modeling_roberta.py"


def named_by_the_authors(injection: peftcore.Injection) -> dict[str, nn.Parameter]:
    """Tensors by their names in the authors' RoBERTa."""
    return {
        f"encoder.layer.{layer}.ef_ffn_adapter.{name.replace('down', 'down_proj').replace('up', 'up_proj')}": parameter
        for layer in (0, 1)
        for name, parameter in injection.operators[f"encoder.layer.{layer}.output.dense"].named_parameters()
    }


@pytest.mark.parametrize("scale", ["4", "learnable_scalar"])
@against("authors", "parallel_adapter", **CODE)
def test_the_encoder_of_the_authors(scale: str) -> None:
    """Of a batch with padding, in training; outputs and gradients."""
    transformers, script = pytest.importorskip("transformers"), run_path(str(AUTHORS.with_suffix(".py")))
    wave, numbers = script["wave"], frozen(AUTHORS)[scale]
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.RobertaConfig(**script["SIZES"], **silent, layer_norm_eps=1e-5)
    model = transformers.RobertaModel(config, add_pooling_layer=False).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(wave(parameter.shape, name))
    options = {"bottleneck": 5, "scale": script["SCALES"][scale], "dtype": "float64"}
    own = named_by_the_authors(peftcore.apply(model, "parallel_adapter", **options))
    assert own.keys() == numbers["gradients"].keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(wave(parameter.shape, name))
    ids = torch.tensor(script["IDS"])
    y = model(input_ids=ids, attention_mask=(ids != 1).long()).last_hidden_state
    (y.square() * wave(y.shape, "direction")).sum().backward()
    assert y.flatten().tolist() == pytest.approx(numbers["output"], abs=1e-8)
    for name, parameter in own.items():
        assert parameter.grad.flatten().tolist() == pytest.approx(numbers["gradients"][name], abs=1e-8), name


@pytest.mark.parametrize(("theirs", "ours"), [("lora", "lora"), ("bert", "normal")])
@against("authors", "parallel_adapter", **CODE, part="start")
def test_start_is_the_authors(theirs: str, ours: str) -> None:
    host = nn.Sequential(nn.Linear(800, 800))
    (operator,) = peftcore.apply(host, "parallel_adapter", target="0", init=ours).operators.values()
    for name, told in frozen(AUTHORS, "start")[theirs].items():
        same_start(operator.get_parameter(name.replace("_proj", "")), told)


@against("authors", "parallel_adapter", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Their layers hold a second adapter each, which a parallel one leaves unused: it has no gradient."""
    transformers, script = pytest.importorskip("transformers"), run_path(str(AUTHORS.with_suffix(".py")))
    model = transformers.RobertaModel(transformers.RobertaConfig(**script["SIZES"]), add_pooling_layer=False)
    injection = peftcore.apply(model, "parallel_adapter", bottleneck=5)
    own = {name: each.numel() for name, each in named_by_the_authors(injection).items()}
    used = frozen(AUTHORS)["4"]["gradients"]
    assert own == {name: count for name, count in frozen(AUTHORS, "trains").items() if name in used}
    assert sum(own.values()) == sum(each.numel() for each in injection.parameters())


@against("authors", "parallel_adapter", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(nn.Sequential(nn.Linear(8, 8)), "parallel_adapter", target="0").config
    narrow = {"bottleneck": "as narrow as the other bottlenecks here by default; theirs is for models 1024 wide"}
    same_defaults(config, frozen(AUTHORS, "defaults"), otherwise=narrow)


def host(name: str) -> tuple[nn.Module, dict[str, Tensor], Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    if name == "moe":
        model.set_experts_implementation("eager")  # grouped products of torch have no float64
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    model = model.double().eval().requires_grad_(False)
    return model, inputs, lambda each: HOSTS[name].output(each(**inputs))


def apply(model: nn.Module, **options: Any) -> peftcore.Injection:
    options = {"bottleneck": 5, "dtype": "float64", **options}
    injection = peftcore.apply(model, "parallel_adapter", **options)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


@pytest.mark.parametrize("scale", [4.0, "learned"])
@pytest.mark.parametrize("name", ["bert", "llama"])
@against(
    "adapters 1.3",
    "parallel_adapter",
    repository="adapter-hub/adapters",
    commit="88f18eb",
    script="src/adapters/methods/modeling.py",
)
def test_the_numbers_of_the_adapters_package(name: str, scale: Any) -> None:
    """Which reads the stream in front of the norm, where one stands there."""
    numbers = frozen(NUMBERS)["parallel_adapter" + (", learned" if scale == "learned" else "")]
    assert_same_adapters("parallel_adapter", numbers, name, scale=scale, reads="branch" if name == "bert" else "stream")


def expect(base: nn.Module, place: tuple[str, str, str], tensors: dict[str, Tensor], activation: str) -> None:
    """The equation as two hooks: one remembers what the block reads, one adds to what it returns."""
    read: dict[str, Tensor] = {}
    first, last, _ = place

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        read["x"] = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        inner = FUNCTIONS[activation](read["x"] @ tensors["down.weight"].T + tensors["down.bias"])
        added = tensors["scale"] * (inner @ tensors["up.weight"].T + tensors["up.bias"])
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    base.get_submodule(first).register_forward_pre_hook(before, with_kwargs=True)
    base.get_submodule(last).register_forward_hook(after)


def compare(name: str, places: Places, activation: str, **options: Any) -> None:
    base, _, run = host(name)
    model = deepcopy(base)
    injection = apply(model, activation=activation, **options)
    unchanged = run(base)
    copies = {}
    for place in [tuple(path.format(layer) for path in each) for layer in (0, 1) for each in places]:
        tensors = {
            key: p.detach().clone().requires_grad_() for key, p in injection.operators[place[2]].named_parameters()
        }
        copies[place[2]] = tensors
        expect(base, place, {"scale": torch.tensor(4.0).double(), **tensors}, activation)
    holders = {path for path, operator in injection.operators.items() if list(operator.parameters())}
    assert holders == set(copies)
    ours, expected = run(model), run(base)
    assert (expected - unchanged).abs().max() > 1e-3 * unchanged.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for path, tensors in copies.items():
        for key, p in injection.operators[path].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-8)


@pytest.fixture(autouse=True)
def plain_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's encoder takes a path of its own, with other roundings. The kit has its own ways."""
    with nullcontext() if "check" in request.fixturenames else without_fast_paths():
        yield


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_equation_beside_the_feed_forward(name: str, activation: str) -> None:
    compare(name, FEED_FORWARDS[name], activation)


# Where the block's output joins the stream, by hand, if that is not where the block ends.
ENDS = {
    "bert": {"output.dense": "output.dropout", "attention.output.dense": "attention.output.dropout"},
    "gpt2": {"mlp": "mlp.dropout", "attn": "attn.resid_dropout"},
    "t5": {"DenseReluDense": "dropout", "SelfAttention": "dropout", "EncDecAttention": "dropout"},
    "encoder": {"linear2": "dropout2", "self_attn": "dropout1"},
}


@pytest.mark.parametrize("name", [*ENDS, "llama"])
def test_training_beside_the_hosts_dropout(name: str) -> None:
    """The host drops what the block returns and not what the adapter adds; outputs and gradients, the same draws."""
    base, _, run = host(name)
    model, bare = deepcopy(base), deepcopy(base)
    options = {"bottleneck": 5, "dropout": 0.0, "dtype": "float64"}
    injection = peftcore.apply(model, "parallel_adapter", target=["attn.output", "mlp.output"], **options)
    copies = filled(injection)
    for first, last, path in FEED_FORWARDS[name] + ATTENTIONS[name]:
        ends = [each for each in ENDS.get(name, {}) if last.endswith(f".{each}")]
        short = max(ends, key=len, default="")
        end = last.removesuffix(short) + ENDS[name][short] if short else last
        for layer in (0, 1):
            place = first.format(layer), end.format(layer), path.format(layer)
            expect(base, place, {"scale": torch.tensor(4.0).double(), **copies[place[2]]}, "relu")
    models = train(model), train(base)
    assert_same(injection, copies, models, run, train(bare))


def layer_of_the_authors(self: nn.Module, x: Tensor, t: dict[str, Tensor], post: bool) -> Tensor:
    """src/transformers/models/bart (post) and mbart (pre-norm) of jxhe/unify-parameter-efficient-tuning."""
    drop = nn.functional.dropout
    h, _ = self.self_attn(x if post else self.self_attn_layer_norm(x), attention_mask=None)
    h = x + drop(h, self.dropout)
    x = self.self_attn_layer_norm(h) if post else h
    h = x if post else self.final_layer_norm(x)
    change = 4.0 * (torch.relu(h @ t["down.weight"].T + t["down.bias"]) @ t["up.weight"].T + t["up.bias"])
    h = drop(self.activation_fn(self.fc1(h)), self.activation_dropout)
    h = drop(self.fc2(h), self.dropout) + change
    return self.final_layer_norm(x + h) if post else x + h


@pytest.mark.parametrize("post", [True, False], ids=["bart", "mbart"])
def test_training_beside_dropout_by_a_function(post: bool) -> None:
    """No module follows the feed-forward, so the adapter joins the sum: in front of the norm, or behind the layer."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_ffn_dim": 24, "encoder_attention_heads": 2, "vocab_size": 40}
    drops = {"dropout": 0.3, "activation_dropout": 0.2, "attention_dropout": 0.0, "encoder_layerdrop": 0.0}
    config = (transformers.BartConfig if post else transformers.MBartConfig)(**sizes, **drops)
    kind = transformers.models.bart.modeling_bart.BartEncoder
    kind = kind if post else transformers.models.mbart.modeling_mbart.MBartEncoder
    torch.manual_seed(0)
    base = kind(config).double().requires_grad_(False)
    model, bare = deepcopy(base), deepcopy(base)
    injection = peftcore.apply(model, "parallel_adapter", bottleneck=5, dropout=0.0, dtype="float64")
    assert not peftcore.plan(bare, "parallel_adapter").notes
    copies = filled(injection)
    rewrite(base, layer_of_the_authors, {f"layers.{i}": [copies[f"layers.{i}.fc2"], post] for i in (0, 1)})
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    models = model.train(), base.train()
    assert_same(injection, copies, models, lambda each: each(ids).last_hidden_state, bare.train())
    notes = peftcore.plan(bare, "houlsby_adapter").notes  # which reads what the host has dropped
    assert len(notes) == 1 and "by a function" in notes[0] and "layers.*.fc2" in notes[0]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_equation_beside_the_attention(name: str) -> None:
    compare(name, ATTENTIONS[name], "relu", target="attn.output")


@pytest.mark.parametrize("name", ATTENTIONS)
def test_equation_with_a_learned_scale_beside_both(name: str) -> None:
    places = FEED_FORWARDS[name] + ATTENTIONS[name]
    compare(name, places, "gelu", target=["attn.output", "mlp.output"], scale="learned")


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_parameters_are_those_of_the_formula(name: str) -> None:
    """2 d r + r + d a block, one more for a learned scale."""
    model, _, _ = host(name)
    blocks = 2 * len(FEED_FORWARDS[name])
    count = blocks * (2 * 16 * 5 + 5 + 16)
    assert sum(p.numel() for p in apply(model).parameters()) == count
    plan = peftcore.plan(model, "parallel_adapter", bottleneck=5, scale="learned")
    assert plan.trainable == count + blocks


def test_start_is_an_exact_identity() -> None:
    """W_down like that of LoRA: uniform within 1 / sqrt(d)."""
    model, _, run = host("llama")
    before = run(model)
    injection = peftcore.apply(model, "parallel_adapter", bottleneck=256)
    assert torch.equal(run(model), before)
    operators = [operator for operator in injection.operators.values() if list(operator.parameters())]
    drawn = torch.cat([operator.down.weight.flatten() for operator in operators])
    assert 0.249 < drawn.abs().max() <= 0.25
    assert abs(drawn.std().item() - 0.25 / 3**0.5) < 0.003
    zeros = [tensor for each in operators for tensor in (each.down.bias, each.up.weight, each.up.bias)]
    assert not any(tensor.any() for tensor in zeros)
    assert all(each.scale == 4.0 for each in operators)


def test_learned_scales_start_at_one_and_train() -> None:
    model, _, run = host("bert")
    injection = apply(model, scale="learned")
    fresh = peftcore.apply(deepcopy(host("bert")[0]), "parallel_adapter", scale="learned")
    assert [operator.scale.item() for operator in fresh.operators.values() if list(operator.parameters())] == [1.0, 1.0]
    run(model).sum().backward()
    assert injection.operators["bert.encoder.layer.1.output.dense"].scale.grad.abs() > 0


def test_dropout_is_between_the_activation_and_the_last_matrix() -> None:
    layer = nn.Sequential(nn.Linear(6, 7)).double().requires_grad_(False)
    injection = apply(layer, target="0", dropout=0.5)
    (operator,) = injection.operators.values()
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones(4, 5, dtype=torch.float64), 0.5)
    inner = torch.relu(x @ operator.down.weight.T + operator.down.bias) * kept
    with injection.disabled():
        expected = layer(x) + 4.0 * (inner @ operator.up.weight.T + operator.up.bias)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_single_matrix_is_a_block_of_its_own() -> None:
    """It reads what the matrix reads, whatever the widths; nothing else of the host is touched."""
    layer = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double().requires_grad_(False)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    base = layer[0](x)
    injection = apply(layer, target="0")
    assert list(injection.operators) == ["0"]
    operator = injection.operators["0"]
    added = 4.0 * operator.up(torch.relu(operator.down(x)))
    torch.testing.assert_close(layer[0](x), base + added, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_is_the_same_with_and_without_a_cache(name: str) -> None:
    """The encoder of T5 runs by itself there, outside of the host's forward."""
    model, inputs, _ = host(name)
    apply(model)
    inputs = {"input_ids": inputs["input_ids"], "min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    cached, plain = (
        model.generate(**inputs, use_cache=use, output_logits=True, return_dict_in_generate=True)
        for use in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-9, atol=1e-9)


def test_parts_of_the_host_run_by_themselves() -> None:
    model, inputs, _ = host("llama")
    apply(model)
    whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
    alone = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)
    assert not forward_context().taps


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_checkpointed_layers_give_the_same_gradients(name: str, reentrant: bool) -> None:
    model, _, run = host(name)
    injection = apply(model)
    model.train()
    for module in model.modules():
        drops = [key for key in ("p", "dropout", "dropout_rate") if isinstance(vars(module).get(key), float)]
        module.__dict__.update(dict.fromkeys(drops, 0.0))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        run(model).square().sum().backward()
        gradients.append([p.grad.clone() for p in injection.parameters()])
        model.zero_grad()
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, again, rtol=1e-10, atol=1e-10)


def test_what_a_block_read_is_let_go_once_it_was_used() -> None:
    """Otherwise the input of every block would stay until the host returns."""
    model, _, run = host("llama")
    apply(model)
    kept: list[int] = []
    model.model.norm.register_forward_hook(lambda module, args, output: kept.append(len(forward_context().taps)))
    run(model)
    assert kept == [0]


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_rows_go_to_different_injections(name: str) -> None:
    model, inputs, _ = host(name)
    inputs = {key: torch.cat([value, value[:1]]) for key, value in inputs.items()}

    def run() -> Tensor:
        return HOSTS[name].output(model(**inputs))

    for each in ("one", "two"):
        apply(model, name=each, seed=len(each))
    alone = []
    for row, names in enumerate((("two",), (), ("one",))):
        with peftcore.activate(model, *names):
            alone.append(run()[row])
    with peftcore.route(model, ["two", None, "one"]):
        together = run()
    assert (alone[0] - alone[2]).abs().max() > 1e-3
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-10, atol=1e-10)


def test_an_unpickled_host_and_a_new_adapter_do_not_share_what_they_read() -> None:
    model, _, run = host("llama")
    apply(model, name="first", target="*.0.mlp.down_proj")
    twin = pickle.loads(pickle.dumps(model))
    expected = run(twin)
    apply(twin, name="second", target="*.0.self_attn.o_proj")
    peftcore.activate(twin, "first")
    torch.testing.assert_close(run(twin), expected)
    keys = {op.first.key for each in peftcore.injections(twin).values() for op in each.operators.values()}
    here = {op.first.key for op in peftcore.injections(model)["first"].operators.values()}
    assert len(keys) == 2
    assert not keys & here


def test_blocks_are_compiled_one_by_one() -> None:
    model, _, run = host("llama")
    injection = apply(model)
    expected = run(model)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in injection.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    ours = run(model)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    ours.square().sum().backward()
    for p, gradient in zip(injection.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-8, atol=1e-8)


def test_cannot_be_merged() -> None:
    model, _, _ = host("llama")
    with pytest.raises(NotMergeable, match="parallel_adapter"):
        apply(model).merge()


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Embedding(5, 4), nn.LayerNorm(4)])
def test_other_layers_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    with pytest.raises(UnsupportedSite):
        peftcore.apply(model, "parallel_adapter", target="0")
    assert type(model[0]) is type(layer)
    assert not peftcore.injections(model)


def test_two_feed_forwards_of_one_block_are_told_apart() -> None:
    """A conformer has one in front of the attention and one behind it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    convolutions = {"conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1}
    embeddings = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2ConformerConfig(**sizes, **convolutions, **embeddings)
    injection = peftcore.apply(transformers.Wav2Vec2ConformerModel(config), "parallel_adapter")
    holders = {graft.site.path: [each.path for each in graft.holders] for graft in injection.grafts}
    for number in (1, 2):
        ffn = f"encoder.layers.0.ffn{number}"
        assert holders[f"{ffn}.output_dense"][:2] == [f"{ffn}.output_dense", f"{ffn}.intermediate_dense"]


def test_a_block_whose_first_matrix_is_not_known_is_refused() -> None:
    """Rather than that it reads what the next block reads."""
    model, _, _ = host("bert")
    known = peftcore.plan(model, "parallel_adapter").host
    unknown = known.override({"bert.encoder.layer.0.intermediate.dense": "other"})
    with pytest.raises(UnsupportedSite, match=r"layer\.0.*reads"):
        peftcore.apply(model, "parallel_adapter", host=unknown)
