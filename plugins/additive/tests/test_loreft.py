"""LoReFT and its ablations: numbers of the authors' interventions (`numbers/loreft_interventions.json`), and of the
positions that they take (`numbers/loreft.json`); the equations, written a second time as hooks on a copy of the host,
in float64; where the prompt is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters_package import IDS, wave
from adapters_package import host as small
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, NotMergeable, TargetError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.tools import without_fast_paths
from peftcore_additive.loreft import ReftOperator

BLOCKS = {
    "llama": "model.layers.{}",
    "bert": "bert.encoder.layer.{}",
    "gpt2": "transformer.h.{}",
    "t5": "encoder.block.{}",
    "encoder": "encoder.layers.{}",
}
KINDS = ("loreft", "noreft", "direft")
NUMBERS = Path(__file__).parent / "numbers" / "loreft_interventions.json"
CODE: Any = {"repository": "stanfordnlp/pyreft", "commit": "dafd099", "script": "pyreft/interventions.py"}
Positions = Sequence[tuple[int, int]]
"""(row, token)."""


# The kit generates from prompts of three tokens, without a cache too: half of them is one position.
@conformance("loreft", options={each: {"prefix_positions": 1} for each in ("llama", "gpt2", "moe", "mistral")})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.fixture(autouse=True)
def plain_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's encoder takes a path of its own, with other roundings. The kit has its own ways."""
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
    injection = peftcore.apply(model, "loreft", **{"dtype": "float64", **options})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def orthonormal(R: Tensor) -> Tensor:
    """The factor with a positive diagonal in the other one, by torch's own decomposition."""
    q, r = torch.linalg.qr(R.T)
    return (q * r.diagonal().sign()).T


def expect(
    block: nn.Module, tensors: dict[str, Tensor], kind: str, ends: dict[str, Positions], function: str | None = None
) -> None:
    """The equation as a hook on a block, at positions that are written down by hand."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        new = h.clone()
        for end, positions in ends.items():
            unit = {key.removeprefix(f"ends.{end}."): value for key, value in tensors.items()}
            R, W, b = unit["R"], unit["learned.weight"], unit["learned.bias"]
            R = orthonormal(R) if kind == "loreft" else R
            for row, token in positions:
                state = h[row, token]
                source = W @ state + b if function is None else getattr(torch, function)(W @ state + b)
                source = source - (0 if kind == "direft" else R @ state)
                new[row, token] = state + R.T @ source
        return (new, *output[1:]) if isinstance(output, tuple) else new

    block.register_forward_hook(hook)


def compare(
    name: str,
    inputs: dict[str, Tensor],
    ends: dict[str, Positions],
    context: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    base, _ = host(name)
    model = deepcopy(base)
    injection = apply(model, **options)
    paths = [BLOCKS[name].format(layer) for layer in (0, 1)]
    assert list(injection.operators) == paths
    before, copies = run(name, base, inputs), {}
    for path in paths:
        parameters = injection.operators[path].named_parameters()
        copies[path] = {key: p.detach().clone().requires_grad_() for key, p in parameters}
        expect(base.get_submodule(path), copies[path], options.get("kind", "loreft"), ends, options.get("activation"))
    with peftcore.call(model, **(context or {})):
        ours = run(name, model, inputs)
    expected = run(name, base, inputs)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for path, tensors in copies.items():
        for key, p in injection.operators[path].named_parameters():
            if tensors[key].grad is not None:  # BERT's head looks at the first token alone
                torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-8)
    assert sum(p.grad.abs().sum() for p in injection.parameters() if p.grad is not None) > 0


# The kit's batch has rows of five and of three tokens, padded on the right: half of three is one.
FRONT, BACK = [(0, 0), (0, 1), (1, 0)], [(0, 4), (1, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_equation_at_both_ends(name: str, kind: str) -> None:
    _, inputs = host(name)
    compare(name, inputs, {"prefix": FRONT, "suffix": BACK}, kind=kind, prefix_positions=2, suffix_positions=1)


@pytest.mark.parametrize("name", BLOCKS)
def test_tied_ends_have_one_intervention(name: str) -> None:
    _, inputs = host(name)
    compare(name, inputs, {"both": FRONT + BACK}, tied=True, prefix_positions=2, suffix_positions=1, rank=2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_padding_in_front_is_no_prompt(name: str) -> None:
    _, inputs = host(name)
    inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    ends = {"prefix": [(0, 0), (0, 1), (1, 2)], "suffix": [(0, 4), (1, 4)]}
    compare(name, inputs, ends, prefix_positions=2, suffix_positions=1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_without_a_mask_all_tokens_are_the_prompt(name: str) -> None:
    _, inputs = host(name)
    del inputs["attention_mask"]
    ends = {"prefix": [(0, 0), (1, 0)], "suffix": [(row, token) for row in (0, 1) for token in (3, 4)]}
    compare(name, inputs, ends, prefix_positions=1, suffix_positions=2)


def test_ends_of_a_short_prompt_have_half_of_it_each() -> None:
    _, inputs = host("llama")
    front, back = [(0, 0), (0, 1), (1, 0)], [(0, 3), (0, 4), (1, 2)]
    compare("llama", inputs, {"prefix": front, "suffix": back}, prefix_positions=4, suffix_positions=4)


def test_where_ends_overlap_the_first_positions_may_come_first() -> None:
    _, inputs = host("llama")
    front = [(0, token) for token in range(4)] + [(1, token) for token in range(3)]
    options: Any = {"prefix_positions": 4, "suffix_positions": 4, "short_prompts": "first"}
    compare("llama", inputs, {"prefix": front, "suffix": [(0, 4)]}, **options)


def test_where_ends_overlap_the_last_positions_may_come_first() -> None:
    _, inputs = host("llama")
    back = [(0, token) for token in range(1, 5)] + [(1, token) for token in range(3)]
    options: Any = {"prefix_positions": 4, "suffix_positions": 4, "short_prompts": "last"}
    compare("llama", inputs, {"prefix": [(0, 0)], "suffix": back}, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_an_activation_of_the_source(kind: str, activation: str) -> None:
    _, inputs = host("bert")
    compare("bert", inputs, {"prefix": FRONT}, kind=kind, prefix_positions=2, activation=activation)


def test_an_identity_has_no_activation() -> None:
    model, _ = host("bert")
    with pytest.raises(ConfigError, match="without an activation"):
        peftcore.apply(model, "loreft", identity=True, activation="relu")


def along(gradient: Tensor, R: Tensor) -> Tensor:
    """The part of the gradient of orthonormal rows along which they stay orthonormal."""
    inner = gradient @ R.mT
    return gradient - (inner + inner.mT) / 2 @ R


@pytest.mark.parametrize("kind", KINDS)
@against("authors", "loreft", **CODE)
def test_the_authors_numbers(kind: str) -> None:
    """At the first two tokens and at the last one, with a suffix and a prefix of their own in both layers of a Llama in
    training. Orthonormal rows have other coordinates in the authors' code, which no number depends on."""
    numbers = frozen(NUMBERS)[kind]
    model = small("llama")
    options: dict[str, Any] = {"rank": 3, "prefix_positions": 2, "suffix_positions": 1, "dtype": "float64"}
    injection = peftcore.apply(model, "loreft", kind=kind, **options)
    units: dict[str, Any] = {}
    for layer in (0, 1):
        for place, end in enumerate(("prefix", "suffix")):
            unit: Any = injection.operators[f"layers.{layer}"].ends[end]
            units[f"{layer}.{end}"], start = unit, 0.2 + layer + 0.5 * place
            with torch.no_grad():
                unit.learned.weight.copy_(0.5 * wave(unit.learned.weight, start))
                unit.learned.bias.copy_(0.5 * wave(unit.learned.bias, start + 0.37))
                rows = numbers["interventions"][f"{layer}.{end}"]["rows"]
                unit.R.copy_(torch.tensor(rows, dtype=torch.float64).view_as(unit.R))
    y = model(input_ids=IDS).last_hidden_state
    (y.square() * wave(y, 0.3)).sum().backward()
    assert y.flatten().tolist() == pytest.approx(numbers["output"], abs=1e-8)
    assert units.keys() == numbers["interventions"].keys()
    for name, unit in units.items():
        R = along(unit.R.grad, unit.R.detach()) if kind == "loreft" else unit.R.grad
        for letter, gradient in {"W": unit.learned.weight.grad, "b": unit.learned.bias.grad, "R": R}.items():
            theirs = numbers["interventions"][name][letter]
            assert gradient.flatten().tolist() == pytest.approx(theirs, abs=1e-7), f"{name} {letter}"


def llama(**sizes: Any) -> Any:
    common = {"vocab_size": 11, "intermediate_size": 12, "num_attention_heads": 2, "max_position_embeddings": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common | sizes))


@pytest.mark.parametrize("kind", KINDS)
@against("authors", "loreft", **CODE, part="start")
def test_start_is_the_authors(kind: Any) -> None:
    """Of a hundred interventions, at both ends of fifty layers, taken together."""
    model = llama(hidden_size=128, num_hidden_layers=50)
    injection = peftcore.apply(model, "loreft", kind=kind, rank=128, suffix_positions=1)
    units: list[Any] = [unit for each in injection.operators.values() for unit in each.ends.values()]
    assert len(units) == 100
    for name, told in frozen(NUMBERS, "start")[kind].items():
        same_start(torch.cat([unit.get_parameter(name).flatten() for unit in units]), told)


@pytest.mark.parametrize("kind", KINDS)
@against("authors", "loreft", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train(kind: Any) -> None:
    model = llama(hidden_size=8, num_hidden_layers=2)
    injection = peftcore.apply(model, "loreft", kind=kind, rank=3)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in injection.parameters()}
    own = [
        f"{layer}.{name}"
        for layer in (0, 1)
        for name, _ in injection.operators[f"model.layers.{layer}"].ends["prefix"].named_parameters()
    ]
    assert {"model": [], "own": own} == frozen(NUMBERS, "trains")[kind]


@against("authors", "loreft", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    """Beside those of a command that names none, which are for a Llama of 32 layers."""
    why = {
        "rank": "4 is the rank of their first command and of their README; 8 is for four layers, and ours takes all",
        "prefix_positions": "their code of the paper's numbers has three first positions in all layers, for GLUE",
        "suffix_positions": "as there, no last ones; what they add differs from task to task, up to seven",
        "layers": "None takes all, as most of their commands do: numbers of layers fit one depth of model",
    }
    config = peftcore.apply(llama(hidden_size=8, num_hidden_layers=2), "loreft").config
    same_defaults(config, frozen(NUMBERS, "defaults"), otherwise=why)


FROZEN = frozen(Path(__file__).parent / "numbers" / "loreft.json")


@pytest.mark.parametrize("ends", sorted({(each["first"], each["last"]) for each in FROZEN}), ids=str)
def test_positions_are_those_of_the_authors_code(ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts of one token to sixteen, alone and in a batch with padding."""
    model, _ = host("llama")
    first, last = ends
    apply(model, prefix_positions=first, suffix_positions=last)
    seen: list[list[Tensor]] = []
    original = ReftOperator._intervene

    def spy(self: Any, h: Tensor, front: Tensor, back: Tensor) -> Tensor:
        seen.append([front, back])
        return original(self, h, front, back)

    monkeypatch.setattr(ReftOperator, "_intervene", spy)
    cases = [each for each in FROZEN if (each["first"], each["last"]) == ends]
    mask = torch.tensor([[int(token < each["length"]) for token in range(16)] for each in cases])
    model(torch.full(mask.shape, 5), attention_mask=mask)
    together = seen[0]
    for row, each in enumerate(cases):
        seen.clear()
        model(torch.full((1, each["length"]), 5))
        for found in (seen[0], [end[row : row + 1] for end in together]):
            positions = [end[0].nonzero().flatten().tolist() for end in found if end.any()]
            assert positions == [end for end in each["positions"][: 2 if first and last else 1] if end], each


def test_one_end_alone_has_one_intervention() -> None:
    _, inputs = host("llama")
    compare("llama", inputs, {"suffix": BACK}, prefix_positions=0, suffix_positions=1)
    model, _ = host("llama")
    assert list(apply(model).operators["model.layers.0"].ends) == ["prefix"]


def test_labels_say_where_the_prompt_ends() -> None:
    """Of the first row three tokens; the second, which is told no labels, is prompt as a whole."""
    _, inputs = host("llama")
    inputs["labels"] = torch.tensor([[-100, -100, -100, 7, 8], [-100] * 5])
    compare("llama", inputs, {"suffix": [(0, 2), (1, 2)]}, prefix_positions=0, suffix_positions=1)
    inputs["labels"] = inputs["input_ids"]  # all tokens are labelled: the whole input
    compare("llama", inputs, {"suffix": [(0, 4), (1, 2)]}, prefix_positions=0, suffix_positions=1)


@pytest.mark.parametrize(("told", "last"), [(2, [(0, 1), (1, 1)]), ([4, 2], [(0, 3), (1, 1)]), ([4, 1], [(0, 3)])])
def test_the_context_says_where_the_prompt_ends(told: Any, last: Positions) -> None:
    _, inputs = host("llama")
    inputs["labels"] = torch.tensor([[-100, -100, -100, 7, 8], [-100] * 5])
    context = {"prompt_length": told}
    compare("llama", inputs, {"suffix": last}, context, prefix_positions=0, suffix_positions=1)


def test_labels_of_an_encoder_are_no_end_of_the_prompt() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertForTokenClassification(transformers.BertConfig(vocab_size=40, **sizes)).double().eval()
    apply(model, prefix_positions=1, suffix_positions=1)
    ids = torch.randint(3, 40, (1, 5))
    labels = torch.tensor([[-100, 1, 0, 1, -100]])
    torch.testing.assert_close(model(ids, labels=labels).logits, model(ids).logits)


def generate(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    made = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
    return made.sequences, torch.stack(made.logits)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_is_that_of_the_equation_with_and_without_a_cache(name: str, options: dict[str, Any]) -> None:
    """The prompt is intervened on, generated tokens never are: hooks on a copy of the host do the same on sequences
    that are given as a whole at each step."""
    base, inputs = host(name)
    inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    model = deepcopy(base)
    injection = apply(model, prefix_positions=2, suffix_positions=1)
    copies = options.get("num_beams", 1)
    rows = [row for row in (0, 1) for _ in range(copies)]
    front = [(i, 2 * row + token) for i, row in enumerate(rows) for token in range(2 - row)]
    ends = {"prefix": front, "suffix": [(i, 4) for i in range(len(rows))]}
    for path, operator in injection.operators.items():
        expect(base.get_submodule(path), dict(operator.named_parameters()), "loreft", ends)
    with torch.no_grad():
        expected = generate(base, inputs, **{**options, "cache_implementation": None}, use_cache=False)
        cached = generate(model, inputs, **options, use_cache=True)
        with peftcore.call(model, prompt_length=[5, 3]):
            told = generate(model, inputs, **options, use_cache=True)
            uncached = generate(model, inputs, **{**options, "cache_implementation": None}, use_cache=False)
    for sequences, logits in (cached, told, uncached):
        assert torch.equal(sequences, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=1e-9, atol=1e-9)


def test_first_positions_need_no_word_on_the_prompt() -> None:
    model, inputs = host("llama")
    apply(model, prefix_positions=2)
    inputs = {"input_ids": inputs["input_ids"]}
    cached, uncached = (generate(model, inputs, use_cache=use) for use in (True, False))
    assert torch.equal(cached[0], uncached[0])
    torch.testing.assert_close(cached[1], uncached[1], rtol=1e-9, atol=1e-9)


def test_a_prompt_that_is_filled_in_pieces_needs_to_be_told() -> None:
    model, inputs = host("llama")
    apply(model, prefix_positions=2, suffix_positions=1)
    masked, inputs = inputs, {"input_ids": inputs["input_ids"]}
    whole = generate(model, inputs, use_cache=True)
    with pytest.raises(MissingContext, match="prompt_length"):
        generate(model, inputs, use_cache=True, prefill_chunk_size=2)
    with peftcore.call(model, prompt_length=5):
        pieces = generate(model, inputs, use_cache=True, prefill_chunk_size=2)
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)
    masked["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    whole = generate(model, masked, use_cache=True)
    for size in (1, 2, 4):  # the mask says how long the prompt is
        pieces = generate(model, masked, use_cache=True, prefill_chunk_size=size)
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 3])
def test_a_piece_of_one_token_is_no_generated_one(size: int) -> None:
    model, inputs = host("llama")
    apply(model, prefix_positions=2)
    with pytest.raises(MissingContext, match="fewer than 4 tokens"):
        generate(model, {"input_ids": inputs["input_ids"][:, :4]}, use_cache=True, prefill_chunk_size=size)


@pytest.mark.parametrize("length", [3, 4])
def test_first_pieces_of_a_prompt_are_as_long_as_needed_or_it_is_told(length: int) -> None:
    """Half of four tokens are two positions, wherever the prompt ends; of three it may be one or two."""
    model, _ = host("llama")
    apply(model, prefix_positions=2)
    ids = torch.randint(3, 40, (1, 9), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    cache = model(ids[:, :length], use_cache=True).past_key_values
    if length == 3:
        with pytest.raises(MissingContext, match="fewer than 4 tokens"):
            model(ids[:, length:], past_key_values=cache)
        return
    torch.testing.assert_close(model(ids[:, length:], past_key_values=cache).logits, whole[:, length:])


def test_generation_without_a_cache_needs_to_be_told_of_the_prompt() -> None:
    model, masked = host("llama")
    inputs = {"input_ids": masked["input_ids"][:, :3]}
    apply(model, prefix_positions=2, suffix_positions=1, name="both")
    with pytest.raises(MissingContext, match="prompt_length"):
        generate(model, inputs, use_cache=False)
    peftcore.activate(model)
    for name, options in (("short", {"prefix_positions": 2}), ("first", {"prefix_positions": 4})):
        apply(model, name=name, short_prompts="half" if name == "short" else "first", **options)
        with peftcore.activate(model, name), pytest.raises(MissingContext, match="fewer than 4"):
            generate(model, inputs, use_cache=False)
        with peftcore.activate(model, name):  # the mask says how long the prompt is
            cached, uncached = (generate(model, masked, use_cache=use) for use in (True, False))
        torch.testing.assert_close(cached, uncached, rtol=1e-9, atol=1e-9)
    peftcore.activate(model, "short")
    run("llama", model, inputs)
    run("llama", model.train(), {**inputs, "use_cache": False})


def test_an_encoder_that_runs_by_itself_knows_its_padding() -> None:
    """As in generate; and when rows go to different injections."""
    model, inputs = host("t5")
    apply(model, prefix_positions=1, suffix_positions=1)
    inside = model(**inputs).encoder_last_hidden_state
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    torch.testing.assert_close(model.encoder(**given).last_hidden_state[1, :3], inside[1, :3], rtol=1e-9, atol=1e-9)
    with peftcore.route(model, ["loreft", "loreft"]):
        torch.testing.assert_close(model.encoder(**given).last_hidden_state[1, :3], inside[1, :3])
    alone, padded = generate(model, {"input_ids": given["input_ids"][1:, :3]}), generate(model, given)
    assert torch.equal(alone[0][0], padded[0][1])


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "encoder"])
def test_rows_go_to_different_injections(name: str) -> None:
    model, inputs = host(name)
    inputs = {key: torch.cat([value, value[:1]]) for key, value in inputs.items()}
    for each in ("one", "two"):
        apply(model, name=each, seed=len(each), suffix_positions=1)
    alone = []
    for row, names in enumerate((("two",), (), ("one",))):
        with peftcore.activate(model, *names):
            alone.append(run(name, model, inputs)[row])
    with peftcore.route(model, ["two", None, "one"]):
        together = run(name, model, inputs)
    assert (alone[0] - alone[2]).abs().max() > 1e-3
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_checkpointed_layers_give_the_same_gradients(name: str, reentrant: bool) -> None:
    model, inputs = host(name)
    injection = apply(model, suffix_positions=1)
    model.train()
    for module in model.modules():
        drops = [key for key in ("p", "dropout", "dropout_rate") if isinstance(vars(module).get(key), float)]
        module.__dict__.update(dict.fromkeys(drops, 0.0))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        run(name, model, inputs).square().sum().backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in injection.parameters()])
        model.zero_grad()
    assert sum(gradient.abs().sum() for gradient in gradients[0]) > 0
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_orthonormal_and_stay_so(dtype: str) -> None:
    model, _ = HOSTS["llama"].build()
    injection = peftcore.apply(model, "loreft", dtype=dtype)
    unit = injection.operators["model.layers.0"].ends["prefix"]
    precision = 1e-5 if dtype == "float32" else 1e-2  # of what is stored
    torch.testing.assert_close(unit.R.float(), unit.rotation(), rtol=precision, atol=precision)
    with torch.no_grad():
        unit.R.add_(torch.randn_like(unit.R))
    R = unit.rotation()
    assert R.dtype == torch.float32
    torch.testing.assert_close(R @ R.T, torch.eye(4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(R, orthonormal(unit.R.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_the_identity_where_it_is_asked_for(kind: str) -> None:
    model, inputs = host("llama")
    before = run("llama", model, inputs)
    peftcore.apply(model, "loreft", kind=kind, identity=True, dtype="float64", suffix_positions=1)
    precision = 1e-6 if kind == "loreft" else 1e-12  # R is drawn in float32, and orthonormal as far as that goes
    scale = before.abs().max().item()
    torch.testing.assert_close(run("llama", model, inputs), before, rtol=0, atol=precision * scale)
    other, _ = host("llama")
    peftcore.apply(other, "loreft", kind=kind, dtype="float64", suffix_positions=1)
    assert (run("llama", other, inputs) - before).abs().max() > 0.01 * before.abs().max()


def test_parameters_are_those_of_the_formula() -> None:
    """2 d r + r for each end, once when tied."""
    model, _ = host("llama")
    for options, ends in (({}, 1), ({"suffix_positions": 2}, 2), ({"suffix_positions": 2, "tied": True}, 1)):
        plan = peftcore.plan(model, "loreft", rank=3, **options)
        assert plan.trainable == 2 * ends * (2 * 16 * 3 + 3)


def test_dropout_acts_on_the_whole_state() -> None:
    model, _ = host("llama")
    injection = apply(model, dropout=0.5, layers=[1])
    unit = injection.operators["model.layers.1"].ends["prefix"].train()
    h = torch.randn(200, 16, dtype=torch.float64)
    dropped = unit(h)
    assert 0.4 < (dropped == 0).double().mean() < 0.6
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * unit.eval()(h)[kept])


def test_layers_are_chosen_by_number() -> None:
    model, _ = host("llama")
    assert list(apply(model, layers=[1]).operators) == ["model.layers.1"]
    with pytest.raises(TargetError, match="0 to 1"):
        apply(model, layers=[2], name="other")
    with pytest.raises(ConfigError, match="set at least one to a positive number"):
        apply(model, prefix_positions=0, name="other")
    with pytest.raises(UnsupportedSite, match="rank=17"):
        apply(model, rank=17, name="other")
    assert list(peftcore.injections(model)) == ["loreft"]


def test_tokens_of_images_are_a_prompt_too() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **sizes)).eval()
    states: list[Tensor] = []
    block = model.get_submodule("layers.0")
    pixels = torch.randn(1, 3, 8, 8)
    injection = peftcore.apply(model, "loreft", prefix_positions=1, suffix_positions=1)
    block.register_forward_hook(lambda module, args, output: states.append(output))
    model(pixels)
    with injection.disabled():
        model(pixels)
    changed = (states[0] - states[1])[0].abs().amax(-1) > 0
    assert changed.tolist() == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("model", "target", "why"),
    [
        (lambda: host("t5")[0], "decoder.block.0", "encoder"),
        (lambda: host("llama")[0], "lm_head", "not a block"),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2), "block", "batch_first"),
    ],
)
def test_what_no_prompt_goes_through_is_refused(model: Callable[[], nn.Module], target: str, why: str) -> None:
    made = model()
    with pytest.raises(UnsupportedSite, match=why):
        peftcore.apply(made, "loreft", target=target)
    assert not peftcore.injections(made)


def test_blocks_without_a_sequence_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
    with pytest.raises(UnsupportedSite, match="sequence"):
        peftcore.apply(transformers.ConvNextModel(config), "loreft")


class Gridded(nn.Module):
    """Convolves a grid of features, then attends over it as a sequence: MaxViT in small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x).flatten(2).mT)
        return self.attn(tokens, tokens, tokens)[0].mT.view_as(x)


@pytest.mark.parametrize("method", ["loreft", "lst"])
def test_blocks_of_a_grid_are_refused(method: str) -> None:
    with pytest.raises(UnsupportedSite, match="grid"):
        peftcore.apply(nn.Sequential(Gridded(), Gridded()), method, target="block")


def test_cannot_be_merged() -> None:
    with pytest.raises(NotMergeable, match="loreft"):
        apply(host("llama")[0]).merge()
