"""PALs: the kit; numbers of the authors' own BERT for rows of two tasks; the equation a second time in hosts of each
kind, with rows of several tasks; keys in the cache; what is shared; how it starts; what is refused. (How tasks are
told: test_tasks.py.)"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import static_windows
import torch
from sines import wave
from told_tasks import assert_beams_keep_the_tasks_of_their_rows
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, NotMergeable, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill
from peftcore.testing.tools import without_fast_paths

NUMBERS = Path(__file__).parent / "numbers" / "pal.json"
CODE: Any = {"repository": "AsaCooperStickland/Bert-n-Pals", "commit": "9b40f4f", "script": "modeling.py"}
OPTIONS: dict[str, Any] = {"tasks": 3, "width": 6, "heads": 2, "dropout": 0.0, "dtype": "float64"}


@conformance(
    "pal",
    options={"*": {"tasks": 3, "task": 1, "width": 12, "init_std": 0.3, "up_std": 0.3}},
    expected_failures=static_windows.REFUSED,
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def in_the_authors_words(model: nn.Module, injection: Any) -> dict[str, Tensor]:
    """The tensors of a BERT and of its PALs, by their names in the authors' BERT; views of ours."""
    named = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.detach()
        for name, tensor in model.named_parameters()
        if not tensor.requires_grad
    }
    (shared,) = injection.shared.values()
    for (layer, operator), task in [(each, t) for each in enumerate(injection.operators.values()) for t in range(2)]:
        start = f"encoder.layer.{layer}.multi_layers.{task}"
        for index, part in enumerate(("query", "key", "value")):
            rows = slice(12 * index, 12 * index + 12)
            named[f"{start}.attn.{part}.weight"] = operator.qkv[task, rows]
            named[f"{start}.attn.{part}.bias"] = operator.qkv_bias[task, 0, rows]
        if layer == 0:  # the first of those that share them
            for name, part in (("aug_dense", "down"), ("aug_dense2", "up")):
                named[f"{start}.{name}.weight"] = getattr(shared, part)[task]
                named[f"{start}.{name}.bias"] = getattr(shared, f"{part}_bias")[task, 0]
    return named


@against("authors", "pal", **CODE)
def test_numbers_of_the_authors() -> None:
    """States and gradients of four rows, two of each task, of which one has padding, in training."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {
        "intermediate_size": 12,
        "type_vocab_size": 16,
        "hidden_dropout_prob": 0,
        "attention_probs_dropout_prob": 0,
    }
    model = transformers.BertModel(transformers.BertConfig(**sizes)).double().train()
    words = model.embeddings.word_embeddings.weight.detach().clone().requires_grad_()
    options = {**OPTIONS, "tasks": 2, "width": 12, "heads": 6}
    injection = peftcore.apply(model, "pal", **options)
    with torch.no_grad():
        for index, (name, tensor) in enumerate(sorted(in_the_authors_words(model, injection).items())):
            tensor.copy_(0.5 * wave(tensor.shape, 0.3 + 0.37 * index))
            if "word_embeddings" in name:
                words.copy_(tensor)
    ids = torch.tensor([[1, 5, 3, 9, 2], [4, 4, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found: dict[str, dict[str, Tensor]] = {"0": {}, "1": {}}
    with peftcore.call(model, task=[0, 0, 1, 1]):
        y = model(inputs_embeds=words[ids].repeat(2, 1, 1), attention_mask=mask.repeat(2, 1))[0]
    parts, trained = (y * mask.repeat(2, 1)[..., None]).chunk(2), [*injection.parameters()]
    for values, part in zip(found.values(), parts, strict=True):
        (part * wave(part.shape, 0.3)).sum().backward(inputs=[words, *trained], retain_graph=True)
        values |= {"y": part, "embeddings.word_embeddings.weight": words.grad.clone()}
        words.grad = None
    for parameter in injection.parameters():
        parameter.data = parameter.grad  # and so the views are those of gradients
    for name, gradient in in_the_authors_words(model, injection).items():
        if ".multi_layers." in name:
            found[name.split(".")[4]][name] = gradient
    numbers = frozen(NUMBERS)
    assert {task: {*each} for task, each in numbers.items()} == {task: {*each} for task, each in found.items()}
    for task, each in numbers.items():
        for name, value in each.items():
            expected = torch.tensor(value, dtype=torch.float64)
            torch.testing.assert_close(found[task][name].flatten(), expected, rtol=1e-7, atol=1e-9, msg=name)


def bert(width: int, layers: int) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=12), add_pooling_layer=False)


@against("authors", "pal", **CODE, part="start")
def test_start_is_the_authors() -> None:
    injection: Any = peftcore.apply(bert(204, 1), "pal", width=198)
    found = {**dict(injection.shared["projections/encoder/layer/n/204"].named_parameters())}
    (operator,) = injection.operators.values()
    found |= dict(operator.named_parameters())
    told = frozen(NUMBERS, "start")
    assert found.keys() == told.keys()
    for name, each in found.items():
        same_start(each, told[name])


@against("authors", "pal", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Where their script is told to freeze the model they train its norms along, which `train` names here."""
    told, injection = frozen(NUMBERS, "trains"), peftcore.apply(bert(8, 2), "pal", tasks=2, width=12, train=["norm.*"])
    norms = {path: each for path, each in injection.operators.items() if "Norm" in path}
    assert sorted(path if path.endswith("bias") else f"{path}.weight" for path in norms) == told["others"]
    assert injection.summary().trainable - 8 * len(norms) == told["tasks"]


@against("authors", "pal", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(bert(8, 1), "pal").config, frozen(NUMBERS, "defaults"))


BLOCKS = {
    "llama": "model.layers.{}",
    "gpt2": "transformer.h.{}",
    "t5": "decoder.block.{}",
    "vit": "vit.layers.{}",
    "bert": "bert.encoder.layer.{}",
    "encoder": "encoder.layers.{}",
}
NORMS = {"bert": "output.LayerNorm", "encoder": "norm2"}
"""The norm that ends a block."""
TOKENS = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
ENCODERS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()  # as the kit masks them
TASKS = [2, 0]


def seen_tokens(name: str, count: int) -> Tensor:
    """Who sees whom, ``[2, tokens, tokens]``, by hand."""
    real = torch.ones(2, count).bool()
    if name not in ("t5", "vit"):
        real = (ENCODERS if name == "encoder" else TOKENS)[:, :count]
    causal = torch.ones(count, count).tril() if name in ("llama", "gpt2", "t5") else torch.ones(count, count)
    return real[:, None] & causal.bool() | torch.eye(count).bool()


def expected(tables: dict[str, Tensor], h: Tensor, seen: Tensor) -> Tensor:
    """The summand, row by row, head by head, with softmax and gelu written out."""
    rows = []
    for row, task in enumerate(TASKS):
        t = {key: table[task] for key, table in tables.items()}
        low = h[row] @ t["down"].T + t["down_bias"]
        heads = []
        for head in (slice(0, 3), slice(3, 6)):
            q, k, v = (low @ t["qkv"][i : i + 6][head].T + t["qkv_bias"][0, i : i + 6][head] for i in (0, 6, 12))
            weights = (q @ k.T / 3**0.5).exp() * seen[row]
            heads.append(weights @ v / weights.sum(-1, keepdim=True))
        made = torch.cat(heads, -1) @ t["up"].T + t["up_bias"]
        rows.append(0.5 * made * (1 + torch.erf(made / 2**0.5)))
    return torch.stack(rows)


def joined(base: nn.Module, name: str, layer: int, tables: dict[str, Tensor]) -> None:
    """Put the summand into a block by hooks."""
    block, made = base.get_submodule(BLOCKS[name].format(layer)), []

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        made[:] = [expected(tables, h, seen_tokens(name, h.shape[1]))]

    def left(module: nn.Module, args: Any, y: Any) -> Any:
        return (y[0] + made[0], *y[1:]) if isinstance(y, tuple) else y + made[0]

    block.register_forward_pre_hook(entered, with_kwargs=True)
    if name in NORMS:
        block.get_submodule(NORMS[name]).register_forward_pre_hook(lambda module, args: (args[0] + made[0],))
    else:
        block.register_forward_hook(left)


@pytest.mark.parametrize("name", BLOCKS)
def test_equation(name: str) -> None:
    """Outputs, and the gradients of all tensors: of rows of two tasks, with padding."""
    torch.manual_seed(0)
    base, inputs = HOSTS[name].build()
    base.double().eval().requires_grad_(False)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    if name in ("llama", "gpt2", "bert"):
        inputs["attention_mask"] = TOKENS[:, : inputs["input_ids"].shape[1]].long()
    model = deepcopy(base)
    injection = peftcore.apply(model, "pal", **OPTIONS, **({"exclude": "encoder"} if name == "t5" else {}))
    fill(injection)
    (shared,) = injection.shared.values()
    with without_fast_paths():
        before = HOSTS[name].output(base(**inputs))
        copies = {key: p.detach().clone().requires_grad_() for key, p in shared.named_parameters()}
        pairs = [(p, copies[key]) for key, p in shared.named_parameters()]
        for layer, operator in enumerate(injection.operators.values()):
            own = {key: p.detach().clone().requires_grad_() for key, p in operator.named_parameters()}
            joined(base, name, layer, {**copies, **own})
            pairs += [(p, own[key]) for key, p in operator.named_parameters()]
        with peftcore.call(model, task=TASKS):
            ours = HOSTS[name].output(model(**inputs))
        theirs = HOSTS[name].output(base(**inputs))
    assert len(pairs) == 4 + 2 * 2 and (theirs - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(ours)
    for output in (ours, theirs):
        (output * direction).sum().backward()
    for mine, other in pairs:
        assert not mine.grad[1].any() and mine.grad[0].any() and mine.grad[2].any()  # of the tasks of the batch
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beams_keep_the_tasks_of_their_rows(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    injection = peftcore.apply(model.eval(), "pal", **{**OPTIONS, "dtype": "float32"})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.7)
    assert_beams_keep_the_tasks_of_their_rows(model, inputs["input_ids"], TASKS)


def test_generation_has_earlier_keys_in_the_cache() -> None:
    """The same tokens as without one, of two tasks, with padding on the left."""
    torch.manual_seed(1)
    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model.double().eval(), "pal", **OPTIONS)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.7)
    given = {"input_ids": inputs["input_ids"], "attention_mask": TOKENS[:, : inputs["input_ids"].shape[1]].long()}
    given |= {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with peftcore.call(model, task=TASKS):
        wanted = model.generate(**given, use_cache=False)
        for way in ({}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(**given, use_cache=True, **way), wanted)
    with injection.disabled():
        assert not torch.equal(model.generate(**given), wanted)


def test_what_is_shared_and_how_it_starts() -> None:
    """Encoder and decoder have matrices of their own, which all of their blocks share."""
    model, _ = HOSTS["t5"].build()
    injection: Any = peftcore.apply(model, "pal", tasks=50, width=60)
    stacks = {"encoder": injection.shared["projections/encoder/block/n/16"]}
    stacks["decoder"] = injection.shared["projections/decoder/block/n/16"]
    assert len(injection.shared) == 2
    for path, operator in injection.operators.items():
        assert operator.shared.module is stacks[path.partition(".")[0]]
        assert not operator.qkv_bias.any() and operator.qkv.std().item() == pytest.approx(0.02, rel=0.02)
    for each in stacks.values():
        assert not each.down_bias.any() and not each.up_bias.any()
        for matrix in (each.down, each.up):
            assert matrix.std().item() == pytest.approx(0.02, rel=0.02) and not torch.equal(matrix[0], matrix[1])


def test_what_is_refused() -> None:
    model, inputs = HOSTS["bert"].build()
    with pytest.raises(ConfigError, match="heads=6"):
        peftcore.apply(model, "pal", width=8)
    with pytest.raises(ConfigError, match=r"width cannot .* overrides can change heads and dropout"):
        peftcore.apply(model, "pal", overrides={"*": {"width": 12}})
    with pytest.raises(UnsupportedSite, match="not a block"):
        peftcore.apply(model, "pal", target="attn.q")
    injection = peftcore.apply(model, "pal", tasks=2, overrides={"*.0": {"heads": 3, "dropout": 0.0}})
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(MissingContext, match="task="):
        model(**inputs)
    with pytest.raises(MissingContext, match="by itself"):
        model.get_submodule("bert.encoder.layer.0.output")(torch.randn(1, 3, 24), torch.randn(1, 3, 16))


def test_a_block_whose_code_says_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a norm ends it decides where the summand joins."""
    model, _ = HOSTS["bert"].build()
    monkeypatch.setattr(type(model.bert.encoder.layer[0].output), "forward", lambda self, h, x: self.LayerNorm(h + x))
    with pytest.raises(UnsupportedSite, match="cannot be traced to see if a norm ends it"):
        peftcore.apply(model, "pal")
