"""The serial adapter: numbers of its authors' encoder and of the adapters package; where it stands, how it starts, and
its equation, written a second time as forward hooks on a copy of the host, in float64."""

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from adapters_package import assert_same_adapters
from dropped_hosts import assert_same, filled, rewrite
from torch import Tensor, nn

import peftcore
from peftcore.author import Replacement
from peftcore.errors import NotMergeable
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

# What the adapters follow, written down by hand: the last matrix of each sub-block, the whole mixture, the attention.
PLACES = {
    "llama": ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"],
    "bert": ["bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"],
    "gpt2": ["transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"],
    "t5": [
        "encoder.block.{}.layer.0.SelfAttention.o",
        "encoder.block.{}.layer.1.DenseReluDense.wo",
        "decoder.block.{}.layer.0.SelfAttention.o",
        "decoder.block.{}.layer.1.EncDecAttention.o",
        "decoder.block.{}.layer.2.DenseReluDense.wo",
    ],
    "moe": ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp"],
    "encoder": ["encoder.layers.{}.self_attn", "encoder.layers.{}.linear2"],
}

NORMS = {
    "llama": ["model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm"],
    "bert": ["bert.encoder.layer.{}.attention.output.LayerNorm", "bert.encoder.layer.{}.output.LayerNorm"],
    "gpt2": ["transformer.h.{}.ln_1", "transformer.h.{}.ln_2"],
    "t5": [
        "encoder.block.{}.layer.0.layer_norm",
        "encoder.block.{}.layer.1.layer_norm",
        "decoder.block.{}.layer.0.layer_norm",
        "decoder.block.{}.layer.1.layer_norm",
        "decoder.block.{}.layer.2.layer_norm",
    ],
    "moe": ["model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm"],
    "encoder": ["encoder.layers.{}.norm1", "encoder.layers.{}.norm2"],
}


@conformance("houlsby_adapter")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.fixture(autouse=True)
def plain_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's encoder takes a path of its own, with other roundings. The kit has its own ways."""
    with nullcontext() if "check" in request.fixturenames else without_fast_paths():
        yield


def host(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model, inputs = HOSTS[name].build()
    if name == "moe":
        model.set_experts_implementation("eager")  # grouped products of torch have no float64
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    return model.double().eval().requires_grad_(False), lambda each: HOSTS[name].output(each(**inputs))


def fill(injection: peftcore.Injection, std: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)


@pytest.mark.parametrize("name", ["bert", "llama"])
@against(
    "adapters 1.3",
    "houlsby_adapter",
    repository="adapter-hub/adapters",
    commit="88f18eb",
    script="src/adapters/methods/modeling.py",
)
def test_the_numbers_of_the_adapters_package(name: str) -> None:
    """Its norms do not train."""
    numbers = frozen(NUMBERS)["houlsby_adapter"]
    assert_same_adapters("houlsby_adapter", numbers, name, activation="silu", train_layer_norm=False)


AUTHORS = Path(__file__).parent / "numbers" / "houlsby_adapter.json"
CODE = {"repository": "google-research/adapter-bert", "commit": "1a31fc6", "script": "modeling.py"}
TENSORS = {"down.weight": "weights1", "down.bias": "biases1", "up.weight": "weights2", "up.bias": "biases2"}


def named_by_the_authors(injection: peftcore.Injection) -> dict[str, Any]:
    """Tensors that train in the encoder by their names in adapter-bert."""
    found = {}
    for path, operator in injection.operators.items():
        place = path.removesuffix(".dense").removesuffix(".bias").replace("encoder.layer.", "layer_").replace(".", "/")
        norm = "beta" if path.endswith(".bias") else "gamma"
        for name, parameter in operator.named_parameters():
            found[f"{place}/{norm}" if name == "value" else f"{place}/adapters/{TENSORS[name]}"] = parameter
    return {name: parameter for name, parameter in found.items() if name.startswith("layer_")}


CODE: Any = {"repository": "google-research/adapter-bert", "commit": "1a31fc6", "script": "modeling.py"}


@against("authors", "houlsby_adapter", **CODE)
def test_the_encoder_of_the_authors() -> None:
    """Outputs, and gradients of all that trains; its biases are rows there, its matrices the other way round."""
    transformers, script = pytest.importorskip("transformers"), run_path(str(AUTHORS.with_suffix(".py")))
    wave, numbers = script["wave"], frozen(AUTHORS)
    sizes = {"hidden_size": script["WIDTH"], "num_attention_heads": script["HEADS"], "vocab_size": 11}
    sizes |= {"intermediate_size": script["INNER"], "num_hidden_layers": script["LAYERS"], "layer_norm_eps": 1e-12}
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **silent, hidden_act="gelu_new")
    model = transformers.BertModel(config, add_pooling_layer=False).double()
    kinds = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta", "weight": "kernel"}

    def fill_as_there(parameter: Tensor, name: str) -> None:
        shape = parameter.shape[::-1] if parameter.dim() == 2 else parameter.shape
        parameter.copy_(wave(shape, name).T if parameter.dim() == 2 else wave(shape, name))

    with torch.no_grad():
        for path, parameter in model.encoder.layer.named_parameters():
            ending = next((each for each in kinds if path.endswith(each)), "")
            name = f"layer_{path.removesuffix(ending)}{kinds.get(ending, '')}".replace(".", "/")
            fill_as_there(parameter, name)
        for table in (model.embeddings.position_embeddings, model.embeddings.token_type_embeddings):
            table.weight.zero_()
    options = {"bottleneck": script["BOTTLENECK"], "activation": "gelu_tanh", "dtype": "float64"}
    own = named_by_the_authors(peftcore.apply(model, "houlsby_adapter", **options))
    assert own.keys() == numbers["gradients"].keys()
    with torch.no_grad():
        for name in own:
            if "adapters" in name:
                fill_as_there(own[name], name)
    y = model(inputs_embeds=script["states"]()).last_hidden_state
    (y.square() * wave(y.shape, "direction")).sum().backward()
    assert y.flatten().tolist() == pytest.approx(numbers["output"], abs=1e-10)
    for name, parameter in own.items():
        gradient = parameter.grad.T if parameter.dim() == 2 else parameter.grad
        assert gradient.flatten().tolist() == pytest.approx(numbers["gradients"][name], abs=1e-9), name


@against("authors", "houlsby_adapter", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Normals that are cut at two deviations, and zeros."""
    injection = peftcore.apply(nn.Sequential(nn.Linear(800, 800)), "houlsby_adapter", target="0")
    (operator,) = injection.operators.values()
    for name, told in frozen(AUTHORS, "start").items():
        (ours,) = (each for each, theirs in TENSORS.items() if name == f"adapters/{theirs}")
        same_start(operator.get_parameter(ours), told)


@against("authors", "houlsby_adapter", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """In the encoder: the adapters and all norms."""
    transformers, script = pytest.importorskip("transformers"), run_path(str(AUTHORS.with_suffix(".py")))
    sizes = {"hidden_size": script["WIDTH"], "num_attention_heads": script["HEADS"], "vocab_size": 11}
    sizes |= {"intermediate_size": script["INNER"], "num_hidden_layers": script["LAYERS"]}
    model = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    own = named_by_the_authors(peftcore.apply(model, "houlsby_adapter", bottleneck=script["BOTTLENECK"]))
    assert {name: each.numel() for name, each in own.items()} == frozen(AUTHORS, "trains")


@against("authors", "houlsby_adapter", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(nn.Sequential(nn.Linear(8, 8)), "houlsby_adapter", target="0").config
    exact = {"activation": "the exact GELU, which theirs approximates to a thousandth"}
    same_defaults(config, frozen(AUTHORS, "defaults"), otherwise=exact)


def bottleneck(tensors: dict[str, Tensor], activation: str) -> Callable[..., Any]:
    """The equation as a hook: it rewrites the output, or the first entry of it."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        inner = FUNCTIONS[activation](h @ tensors["down.weight"].T + tensors["down.bias"])
        y = h + inner @ tensors["up.weight"].T + tensors["up.bias"]
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("name", PLACES)
def test_equation_on_hosts(name: str, activation: str) -> None:
    base, run = host(name)
    model = deepcopy(base)
    injection = peftcore.apply(
        model, "houlsby_adapter", bottleneck=5, activation=activation, train_layer_norm=False, dtype="float64"
    )
    fill(injection)
    operators = injection.operators
    places = [place.format(layer) for layer in (0, 1) for place in PLACES[name]]
    assert sorted(operators) == sorted(places)
    before = run(base)
    copies = {}
    for place in places:
        tensors = {key: p.detach().clone().requires_grad_() for key, p in operators[place].named_parameters()}
        copies[place] = tensors
        base.get_submodule(place).register_forward_hook(bottleneck(tensors, activation))
    ours, expected = run(model), run(base)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for place, tensors in copies.items():
        for key, p in operators[place].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-8)


# Behind which module each of `PLACES` joins the stream, by hand: the host's dropout of the branch, or nothing.
ENDS = {
    "llama": PLACES["llama"],
    "bert": ["bert.encoder.layer.{}.attention.output.dropout", "bert.encoder.layer.{}.output.dropout"],
    "gpt2": ["transformer.h.{}.attn.resid_dropout", "transformer.h.{}.mlp.dropout"],
    "t5": [
        "encoder.block.{}.layer.0.dropout",
        "encoder.block.{}.layer.1.dropout",
        "decoder.block.{}.layer.0.dropout",
        "decoder.block.{}.layer.1.dropout",
        "decoder.block.{}.layer.2.dropout",
    ],
    "moe": PLACES["moe"],
    "encoder": ["encoder.layers.{}.dropout1", "encoder.layers.{}.dropout2"],
}


def train_with(model: nn.Module, p: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model.train()


@pytest.mark.parametrize("joins", ["stream", "matrix"])
@pytest.mark.parametrize("name", PLACES)
def test_training_with_the_hosts_dropout(name: str, joins: str) -> None:
    """The authors' code adapts what the host has dropped; with joins="matrix" the host drops the adapter's output, too.
    Outputs and gradients, with the same draws."""
    base, run = host(name)
    model = deepcopy(base)
    injection = peftcore.apply(
        model, "houlsby_adapter", bottleneck=5, joins=joins, train_layer_norm=False, dtype="float64"
    )
    fill(injection)
    copies = {}
    for place, end in zip(PLACES[name], (ENDS if joins == "stream" else PLACES)[name], strict=True):
        for layer in (0, 1):
            operator = injection.operators[place.format(layer)]
            tensors = {key: p.detach().clone().requires_grad_() for key, p in operator.named_parameters()}
            copies[place.format(layer)] = tensors
            base.get_submodule(end.format(layer)).register_forward_hook(bottleneck(tensors, "gelu"))
    outputs = []
    for each in (model, base):
        torch.manual_seed(3)
        outputs.append(run(train_with(each, 0.3)))
    ours, expected = outputs
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in outputs:
        (output * direction).sum().backward()
    for place, tensors in copies.items():
        for key, p in injection.operators[place].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-8)


def adapted(h: Tensor, t: dict[str, Tensor]) -> Tensor:
    return h + FUNCTIONS["gelu"](h @ t["down.weight"].T + t["down.bias"]) @ t["up.weight"].T + t["up.bias"]


def beit_layer(self: nn.Module, x: Tensor, attn: dict[str, Tensor], mlp: dict[str, Tensor]) -> Tensor:
    h = self.dropout(self.attention(self.layernorm_before(x), attention_mask=None)[0])
    x = adapted(self.drop_path(self.lambda_1 * h), attn) + x
    h = self.dropout(self.mlp(self.layernorm_after(x)))
    return adapted(self.drop_path(self.lambda_2 * h), mlp) + x


def dinov2_layer(self: nn.Module, x: Tensor, attn: dict[str, Tensor], mlp: dict[str, Tensor]) -> Tensor:
    h = self.attention(self.norm1(x), attention_mask=None)[0]
    x = adapted(self.drop_path(self.layer_scale1(h)), attn) + x
    return adapted(self.drop_path(self.layer_scale2(self.mlp(self.norm2(x)))), mlp) + x


IMAGE_MODELS = {
    "Beit": (beit_layer, {"layer_scale_init_value": 0.01, "intermediate_size": 24}),  # it scales by a bare parameter
    "Dinov2": (dinov2_layer, {"layerscale_value": 0.01, "mlp_ratio": 2}),
}


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_training_with_layer_scale_and_stochastic_depth(name: str) -> None:
    """Serially as with dropout: behind all of it. One drop path ends both branches of a block there."""
    transformers = pytest.importorskip("transformers")
    layer, options = IMAGE_MODELS[name]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    drops = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.4}
    config = getattr(transformers, f"{name}Config")(**sizes, **drops, **options)
    torch.manual_seed(0)
    base = getattr(transformers, f"{name}Model")(config).double().requires_grad_(False).train()
    model, bare = deepcopy(base), deepcopy(base)
    injection = peftcore.apply(model, "houlsby_adapter", bottleneck=5, train_layer_norm=False, dtype="float64")
    assert not peftcore.plan(bare, "houlsby_adapter").notes
    copies = filled(injection)
    blocks: dict[str, list[Any]] = {}
    for path in copies:
        blocks.setdefault(re.match(r".*\.\d+", path)[0], []).append(copies[path])
    rewrite(base, layer, blocks)
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    assert_same(injection, copies, (model, base), lambda each: each(x).last_hidden_state, bare)


OUTSIDE = {
    "llama": ["model.norm"],
    "bert": ["bert.embeddings.LayerNorm"],
    "gpt2": ["transformer.ln_f"],
    "t5": ["encoder.final_layer_norm", "decoder.final_layer_norm"],
    "moe": ["model.norm"],
    "encoder": ["encoder.norm"],
}
"""Norms that are in no block."""


@pytest.mark.parametrize("which", [True, "blocks"])
@pytest.mark.parametrize("name", PLACES)
def test_norms_train_along(name: str, which: Any) -> None:
    """2 (2 d r + r + d) a layer, and the norms: by default all of them, as google-research/adapter-bert at 1a31fc6 has
    it, whose optimizer takes the collection "layer_norm", where modeling.py puts each norm that it makes."""
    model, _ = host(name)
    places = [place.format(layer) for layer in (0, 1) for place in NORMS[name]]
    outside = [path for path in OUTSIDE[name] if any(path == each for each, _ in model.named_modules())]
    norms = {
        f"{place}.{key}".removesuffix(".weight")
        for place in [*places, *(outside if which is True else ())]
        for key, _ in model.get_submodule(place).named_parameters()
    }
    options: Any = {"bottleneck": 5, **({} if which is True else {"train_layer_norm": which})}
    injection = peftcore.apply(model, "houlsby_adapter", **options)
    assert {path for path, operator in injection.operators.items() if isinstance(operator, Replacement)} == norms
    adapters = len(injection.operators) - len(norms)
    assert adapters == 2 * len(PLACES[name])
    count = adapters * (2 * 16 * 5 + 5 + 16) + len(norms) * 16
    assert sum(p.numel() for p in injection.parameters()) == count
    assert peftcore.plan(host(name)[0], "houlsby_adapter", **options).trainable == count
    assert all(p.requires_grad for p in injection.parameters())


def test_norms_are_those_of_the_authors_or_stay() -> None:
    model, run = host("bert")
    injection = peftcore.apply(model, "houlsby_adapter", train_layer_norm=False)
    assert len(injection.operators) == 4
    injection.remove()
    injection = peftcore.apply(model, "houlsby_adapter")
    run(model).sum().backward()
    for place in ("bert.encoder.layer.0.output.LayerNorm", "bert.embeddings.LayerNorm"):
        assert injection.operators[place].value.grad.abs().max() > 0


def test_start_is_near_the_identity_or_exactly_it() -> None:
    model, run = host("llama")
    before = run(model)
    injection = peftcore.apply(model, "houlsby_adapter")
    moved = (run(model) - before).abs().max() / before.abs().max()
    assert 0 < moved < 1e-3
    injection.remove()
    peftcore.apply(model, "houlsby_adapter", up_init_std=0.0)
    assert torch.equal(run(model), before)


def test_a_mixture_is_adapted_as_a_whole() -> None:
    """Once for each token after the experts were mixed, not once for each expert."""
    model, run = host("moe")
    injection = peftcore.apply(model, "houlsby_adapter", train_layer_norm=False)
    operator = injection.operators["model.layers.0.mlp"]
    seen: list[Tensor] = []
    operator.down.weight.register_hook(lambda gradient: seen.append(gradient))
    run(model).sum().backward()
    assert len(seen) == 1
    assert not any("expert" in path for path in injection.operators)


def test_attention_weights_pass_untouched() -> None:
    """torch's attention returns a pair: the output is adapted, the weights are not."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    stack = nn.TransformerEncoder(model, 1, enable_nested_tensor=False)
    attention = stack.layers[0].self_attn
    x = torch.randn(2, 4, 8)
    output, weights = attention(x, x, x)
    injection = peftcore.apply(stack, "houlsby_adapter", train_layer_norm=False, joins="matrix")
    fill(injection)
    adapted, still = attention(x, x, x)
    assert torch.equal(still, weights)
    assert (adapted - output).abs().max() > 0.01


def test_stands_before_the_residual_and_the_norm() -> None:
    """The residual stream itself is not adapted: what is added to it is a function of the sub-block alone."""
    model, run = host("llama")
    hidden: dict[str, Tensor] = {}
    layer = model.model.layers[0]
    injection = peftcore.apply(model, "houlsby_adapter", train_layer_norm=False, dtype="float64")
    fill(injection)
    layer.input_layernorm.register_forward_hook(lambda module, args, output: hidden.update(stream=args[0]))
    layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: hidden.update(attention=output))
    layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: hidden.update(after=args[0]))
    run(model)
    torch.testing.assert_close(hidden["after"], hidden["stream"] + hidden["attention"])


def test_cannot_be_merged() -> None:
    model, _ = host("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    injection = peftcore.apply(model, "houlsby_adapter", train_layer_norm=False)
    with pytest.raises(NotMergeable, match="houlsby_adapter"):
        injection.merge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 3)])
def test_convolutions_are_adapted_at_each_position(layer: nn.Module) -> None:
    x = torch.randn(2, 3, 7, *([7] if layer.weight.dim() == 4 else []))
    model, expected = nn.Sequential(layer), layer(x).movedim(1, -1)
    injection = peftcore.apply(model, "houlsby_adapter", target="0")
    (operator,) = injection.operators.values()
    for parameter in injection.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    inner = operator.activation(expected @ operator.down.weight.T + operator.down.bias)
    torch.testing.assert_close(model(x), (expected + inner @ operator.up.weight.T + operator.up.bias).movedim(-1, 1))


def test_the_defaults_are_an_exact_gelu_of_width_64() -> None:
    base, run = host("bert")
    model = deepcopy(base)
    injection = peftcore.apply(model, "houlsby_adapter", train_layer_norm=False, dtype="float64")
    fill(injection)
    for place, operator in injection.operators.items():
        tensors = {key: p.detach() for key, p in operator.named_parameters()}
        assert tensors["down.weight"].shape == (64, 16)
        base.get_submodule(place).register_forward_hook(bottleneck(tensors, "gelu"))
    torch.testing.assert_close(run(model), run(base), rtol=1e-10, atol=1e-10)
