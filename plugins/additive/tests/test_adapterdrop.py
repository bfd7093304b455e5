"""AdapterDrop: numbers of the adapters package; which layers have adapters, what they compute (the equation a second
time, as hooks on a copy of the host, in float64), where backward ends, and the numbers that the robust kind draws."""

import pickle
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import adapters_package as package
import pytest
import torch
from dropped_hosts import assert_same, filled, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.author import forward_context
from peftcore.errors import NotMergeable, TargetError, TrainingError, UnsupportedSite
from peftcore.testing import against, conformance, frozen
from peftcore.testing.hosts import HOSTS
from peftcore.training.optimizer import transient

LAYERS = 4
PLACES = {
    "llama": ["model.layers.{}.mlp.down_proj"],
    "bert": ["bert.encoder.layer.{}.output.dense"],
    "gpt2": ["transformer.h.{}.mlp.c_proj"],
    "t5": ["encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"],
}
CONFIGS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_hidden_layers": LAYERS, "intermediate_size": 24}),
    "bert": (
        "BertConfig",
        "BertForSequenceClassification",
        {"num_hidden_layers": LAYERS, "intermediate_size": 24},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"num_hidden_layers": LAYERS, "n_positions": 32}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"num_layers": LAYERS, "d_ff": 24, "d_kv": 8}),
}


@conformance("adapterdrop", options={"*": {"drop_first_layers": 1}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("kind", ["specialised", "robust 0", "robust 1"])
@pytest.mark.parametrize("name", ["bert", "llama"])
@against(
    "adapters 1.3",
    "adapterdrop",
    repository="adapter-hub/adapters",
    commit="88f18eb",
    script="src/adapters/methods/adapter_layer_base.py",
)
def test_the_numbers_of_the_adapters_package(name: str, kind: str) -> None:
    """In training: the package is told each time how many layers it skips, and so is the robust kind here."""
    numbers = frozen(Path(__file__).parent / "numbers" / "adapterdrop.json")[kind]
    model, robust = package.host(name), kind != "specialised"
    options: dict[str, Any] = {"bottleneck": 4, "drop_first_layers": 1, "robust": robust, "dtype": "float64"}
    injection = peftcore.apply(model, "adapterdrop", **options)
    operators = list(injection.operators.values())
    assert len(operators) == (2 if robust else 1)
    package.waves([p for each in operators for p in each.parameters()], 0.2)
    skipped = kind == "robust 1"
    acting = [p for each in operators[skipped:] for p in each.parameters()]
    with peftcore.call(model, drop_first_layers=int(skipped)):
        package.assert_same(model, package.host(name), acting, numbers[name])
    assert all(p.grad is None for each in operators[:skipped] for p in each.parameters())


def host(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """The kit's host with more layers, in float64."""
    transformers = pytest.importorskip("transformers")
    config, model, sizes = CONFIGS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(vocab_size=40, hidden_size=16, num_attention_heads=2, pad_token_id=0, **sizes)
    inputs = HOSTS[name].build()[1]
    made = getattr(transformers, model)(made).double().eval().requires_grad_(False)
    return made, lambda each: HOSTS[name].output(each(**inputs))


def apply(model: nn.Module, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, "adapterdrop", **{"bottleneck": 5, "dtype": "float64", **options})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def adapt_by_hand(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    def hook(module: nn.Module, args: Any, h: Tensor) -> Tensor:
        inner = torch.relu(h @ tensors["down.weight"].T + tensors["down.bias"])
        return h + inner @ tensors["up.weight"].T + tensors["up.bias"]

    module.register_forward_hook(hook)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        names = ("p", "dropout", "dropout_rate", "attention_dropout")
        module.__dict__.update({key: 0.0 for key in names if isinstance(vars(module).get(key), float)})
    return model


def watched(model: nn.Module, injection: peftcore.Injection) -> list[int]:
    """What the forwards of the host draw, one after the other."""
    draws, numbers = injection.shared["draws"], []
    model.register_forward_pre_hook(lambda *_: numbers.append(draws(forward_context())) if model.training else None)
    return numbers


@pytest.mark.parametrize("dropped", [0, 1, 3])
@pytest.mark.parametrize("name", PLACES)
def test_equation_in_the_layers_that_are_left(name: str, dropped: int) -> None:
    base, run = host(name)
    model = deepcopy(base)
    injection = apply(model, drop_first_layers=dropped)
    places = [place.format(layer) for place in PLACES[name] for layer in range(dropped, LAYERS)]
    assert sorted(injection.operators) == sorted(places)
    before, copies = run(base), {}
    for place in places:
        parameters = injection.operators[place].named_parameters()
        copies[place] = {key: p.detach().clone().requires_grad_() for key, p in parameters}
        adapt_by_hand(base.get_submodule(place), copies[place])
    ours, expected = run(model), run(base)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for place, tensors in copies.items():
        for key, p in injection.operators[place].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-8)


# Behind which module each of `PLACES` joins the stream, by hand.
ENDS = {
    "bert": ["bert.encoder.layer.{}.output.dropout"],
    "gpt2": ["transformer.h.{}.mlp.dropout"],
    "t5": ["encoder.block.{}.layer.1.dropout", "decoder.block.{}.layer.2.dropout"],
}


@pytest.mark.parametrize("name", ENDS)
def test_training_with_the_hosts_dropout(name: str) -> None:
    """The adapters package adapts what the host has dropped; outputs and gradients, with the same draws."""
    base, run = host(name)
    model, bare = deepcopy(base), deepcopy(base)
    injection = apply(model, drop_first_layers=1)
    copies = filled(injection)
    for place, end in zip(PLACES[name], ENDS[name], strict=True):
        for layer in range(1, LAYERS):
            adapt_by_hand(base.get_submodule(end.format(layer)), copies[place.format(layer)])
    assert_same(injection, copies, (train(model), train(base)), run, train(bare))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_backward_ends_at_the_first_layer_that_is_adapted(name: str) -> None:
    """Nothing below has an autograd edge, so nothing below keeps activations."""
    model, run = host(name)
    apply(model, drop_first_layers=2)
    outputs: list[bool] = []
    for layer in range(LAYERS):
        block = model.get_submodule(PLACES[name][0].format(layer).split(f".{layer}.")[0] + f".{layer}")
        block.register_forward_hook(
            lambda module, args, output: outputs.append(
                (output[0] if isinstance(output, tuple) else output).grad_fn is not None
            )
        )
    run(model.train())
    assert outputs == [False, False, True, True]


def test_parameters_are_those_of_the_formula() -> None:
    """(L - m)(2 d r + r + d), L of them when robust; twice as many with two adapters a layer."""
    one = 2 * 16 * 5 + 5 + 16
    model, _ = host("llama")
    for options, adapters in (
        ({"drop_first_layers": 1}, LAYERS - 1),
        ({"drop_first_layers": 3, "robust": True}, LAYERS),
        ({"drop_first_layers": 1, "target": ("attn.output", "mlp.output")}, 2 * (LAYERS - 1)),
    ):
        plan = peftcore.plan(model, "adapterdrop", bottleneck=5, **options)
        assert plan.trainable == adapters * one


def test_how_many_layers_are_dropped_by_default() -> None:
    """Of twelve: five when specialised, as in the paper's abstract. When robust, 0 to 10: `np.random.randint(0, 11)` in
    notebooks/Adapter_Drop_Training.ipynb of adapter-hub/adapters at 88f18eb; the paper's 0 to 11 is an option."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 12, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes))
    injection = peftcore.apply(model, "adapterdrop")
    assert [path.split(".")[2] for path in injection.operators] == [str(layer) for layer in range(5, 12)]
    injection.remove()
    for options, most in (({}, 10), ({"drop_first_layers": 11}, 11), ({"drop_first_layers": 40}, 11)):
        injection = peftcore.apply(model, "adapterdrop", robust=True, **options)
        assert len(injection.operators) == 12
        draws = injection.shared["draws"]
        seen = {draws(peftcore.author.ForwardContext(model=model, args=(torch.zeros(1),))) for _ in range(400)}
        assert seen == set(range(most + 1))
        injection.remove()


@pytest.mark.parametrize("layers", [1, 2])
def test_where_few_layers_are_all_that_there_are(layers: int) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": layers, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes))
    assert peftcore.apply(model, "adapterdrop", robust=True).shared["draws"].most == 0
    with pytest.raises(
        TargetError, match=f"drop_first_layers=5 leaves no layer with an adapter: the model has {layers} layers"
    ):
        peftcore.apply(model, "adapterdrop", name="another")


def test_stages_of_a_pyramid_count_as_one_stack() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    model = transformers.SwinModel(transformers.SwinConfig(**sizes))
    sites = [site.path for site in peftcore.plan(model, "adapterdrop", drop_first_layers=3).sites]
    assert len(sites) == 1
    assert sites[0].startswith("encoder.layers.1.blocks.1.")


def test_dropping_every_layer_is_refused() -> None:
    model, _ = host("llama")
    with pytest.raises(TargetError, match="no layer with an adapter: the model has 4 layers"):
        apply(model, drop_first_layers=4)
    assert not peftcore.injections(model)


def test_modules_outside_of_layers_are_refused() -> None:
    with pytest.raises(UnsupportedSite, match="layers"):
        apply(host("llama")[0], target="lm_head")


def equal_to_specialised(name: str, injection: peftcore.Injection, output: Tensor, dropped: int) -> None:
    """The output is that of a host whose lowest layers have no adapters at all."""
    model, run = host(name)
    other = apply(model, drop_first_layers=dropped)
    with torch.no_grad():
        for path, operator in other.operators.items():
            operator.load_state_dict(injection.operators[path].state_dict())
    torch.testing.assert_close(output, run(model), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLACES)
def test_a_robust_adapter_serves_any_number_of_layers(name: str) -> None:
    model, run = host(name)
    injection = apply(model, drop_first_layers=3, robust=True)
    equal_to_specialised(name, injection, run(model), 0)
    for dropped in range(LAYERS):
        with peftcore.call(model, drop_first_layers=dropped):
            equal_to_specialised(name, injection, run(model), dropped)


@pytest.mark.parametrize("name", PLACES)
def test_each_forward_in_training_drops_another_number_everywhere(name: str) -> None:
    model, run = host(name)
    injection = apply(without_dropout(model), drop_first_layers=3, robust=True, seed=1)
    seen = watched(model.train(), injection)
    for _ in range(12):
        before = torch.random.get_rng_state()
        output = run(model)
        assert torch.equal(before, torch.random.get_rng_state())
        equal_to_specialised(name, injection, output, seen[-1])
    assert set(seen) == {0, 1, 2, 3}


def numbers(seed: int, forwards: int = 400) -> list[int]:
    """What a robust injection draws, without running a host for it."""
    model, _ = host("llama")
    draws = apply(model, drop_first_layers=3, robust=True, seed=seed).shared["draws"]
    return [
        draws(peftcore.author.ForwardContext(model=nn.Linear(1, 1), args=(torch.zeros(1),))) for _ in range(forwards)
    ]


def test_draws_are_even_and_depend_on_the_seed_alone() -> None:
    first = numbers(1)
    assert first == numbers(1)
    assert first != numbers(2)
    assert sorted(Counter(first)) == [0, 1, 2, 3]
    assert max(abs(count - 100) for count in Counter(first).values()) < 30


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_what_backward_computes_again_drops_the_same(name: str, reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        model, run = host(name)
        torch.manual_seed(1)
        injection = apply(without_dropout(model), drop_first_layers=3, robust=True, seed=3)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = []
        for _ in range(3):  # one backward over three forwards, each of which drew for itself
            losses.append(run(model).square().sum())
        sum(losses).backward()
        results.append([torch.zeros_like(p) if p.grad is None else p.grad for p in injection.parameters()])
    assert sum(gradient.abs().sum() for gradient in results[0]) > 0
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-9, atol=1e-9)


def test_a_host_that_is_computed_again_as_a_whole_drops_the_same() -> None:
    """Also several of them before one backward."""
    results = []
    for checkpointed in (False, True):
        model, run = host("llama")
        torch.manual_seed(1)
        injection = apply(without_dropout(model), drop_first_layers=3, robust=True, seed=3)
        model.train()
        for _ in range(4):
            trigger = torch.zeros((), requires_grad=True)
            again = partial(checkpoint, lambda _, each, run: run(each), trigger, model, run, use_reentrant=True)
            output = again() if checkpointed else run(model)
            output.square().sum().backward()
        assert injection.shared["draws"].count == 4
        sum((again() if checkpointed else run(model)).sum() for _ in range(8)).backward()
        results.append([p.grad for p in injection.parameters()])
    for plain, repeated in zip(*results, strict=True):
        torch.testing.assert_close(plain, repeated, rtol=1e-9, atol=1e-9)


def test_backward_of_a_robust_adapter_ends_where_it_was_dropped() -> None:
    model, run = host("llama")
    injection = apply(without_dropout(model), drop_first_layers=3, robust=True, seed=1)
    seen = watched(model.train(), injection)
    for _ in range(4):
        run(model).square().sum().backward()
        trained = [operator.up.weight.grad is not None for operator in injection.operators.values()]
        assert trained == [layer >= seen[-1] for layer in range(LAYERS)]
        model.zero_grad()
    assert len(set(seen)) > 1


def test_resumed_training_draws_what_the_first_would_have_drawn() -> None:
    """What optimizers of injections save is enough for it."""

    def trained(steps: int, state: dict[str, Tensor] | None = None) -> tuple[list[int], dict[str, Tensor]]:
        model, run = host("llama")
        injection = apply(model, drop_first_layers=3, robust=True, seed=5 if state is None else 6)
        for name, buffer in transient(injection):
            buffer.copy_(buffer if state is None else state[name])
        seen = watched(model.train(), injection)
        for _ in range(steps):
            run(model)
        return seen, dict(transient(injection))

    whole, _ = trained(8)
    first, state = trained(3)
    assert first + trained(5, state)[0] == whole


def test_files_hold_the_adapters_alone(tmp_path: Path) -> None:
    model, run = host("llama")
    injection = apply(model, drop_first_layers=2, robust=True)
    assert all(key.startswith("model.layers.") for key in injection.state_dict())
    injection.save(tmp_path)
    other, _ = host("llama")
    peftcore.load(other, tmp_path)
    torch.testing.assert_close(run(other), run(model))


def test_copies_draw_for_themselves() -> None:
    model, run = host("llama")
    injection = apply(model, drop_first_layers=3, robust=True)
    run(model.train())
    for twin in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        mine = peftcore.injections(twin)["adapterdrop"]
        assert not mine.shared["draws"].drawn
        run(twin)
        assert mine.shared["draws"].count == injection.shared["draws"].count + 1


def test_training_a_part_of_the_host_alone_is_refused() -> None:
    """Nothing tells one forward from the next there."""
    model, _ = host("llama")
    apply(model, drop_first_layers=3, robust=True)
    with pytest.raises(TrainingError, match="host itself"):
        model.train().model(torch.ones(1, 3, dtype=torch.int64))
    assert not forward_context().inputs


@pytest.mark.slow
def test_a_compiled_host_drops_too() -> None:
    model, run = host("llama")
    injection = apply(without_dropout(model), drop_first_layers=3, robust=True, seed=1)
    seen = watched(model.train(), injection)
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    for _ in range(3):
        equal_to_specialised("llama", injection, run(model), seen[-1])
    assert len(set(seen)) > 1


def test_cannot_be_merged() -> None:
    with pytest.raises(NotMergeable, match="adapterdrop"):
        apply(host("llama")[0], drop_first_layers=1).merge()
