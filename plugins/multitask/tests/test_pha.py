"""PHA: the kit; states, losses and gradients of the authors' encoder and decoder in training; the losses a second time,
row by row; what the retriever reads; which adapters are made; beams; what is refused. (How tasks
are told: test_tasks.py.)"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from told_tasks import assert_beams_keep_the_tasks_of_their_rows
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill
from peftcore_multitask.pha import contrast

NUMBERS = Path(__file__).parent / "numbers" / "pha.json"
CODE: Any = {"repository": "Bumble666/PHA", "commit": "bbb4169", "script": "modeling/adapter_t5.py"}
SMALL = {"tasks": 3, "bottleneck": 2, "task_width": 4, "hidden": 5, "code": 3}
TASKS = [2, 0, 2, 1]
IDS = torch.tensor([[5, 1, 3, 8], [2, 9, 4, 0], [7, 7, 1, 0], [3, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
ANSWERS = torch.tensor([[0, 4, 2], [0, 8, 5], [0, 1, 1], [0, 3, 9]])
SIZES = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 12, "num_layers": 2, "vocab_size": 10, "dropout_rate": 0.0}

KIT = {**SMALL, "bottleneck": 4, "hidden": 32, "code": 8, "task": 1, "init_scale": 1.0}
"""Of few hidden numbers all may be below zero for a layer, which then learns nothing; the steps of the kit are few."""


@conformance("pha", options={"*": KIT})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


def waves(shapes: list[tuple[int, ...]], first: float, size: float) -> list[Tensor]:
    return [size * wave(*shape, step=first + 0.003 * index) for index, shape in enumerate(shapes)]


def thin(tensor: Tensor) -> list[float]:
    """Some numbers of a tensor, and its norm, as the script has them."""
    flat = tensor.detach().flatten()
    return [*flat[:: len(flat) // 16 | 1].tolist(), flat.norm().item()]


def t5(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(**{**SIZES, **changes}, decoder_start_token_id=0, tie_word_embeddings=False)
    return transformers.T5ForConditionalGeneration(config).double()


def parts(injection: Any) -> list[list[nn.Parameter]]:
    """The parameters in the order of the authors' numbers; those of layers are rows of one of theirs."""
    shared, operators = injection.shared, injection.operators
    network, retriever = shared["network/8/8"], shared["retriever"]
    single = [shared["prototypes"].value, *retriever.first.parameters(), *retriever.second.parameters()]
    for layer in (network.first, network.second, network.norm, network.down_bias, network.up_bias):
        single += layer.parameters()
    for path, each in operators.items():
        if path.startswith("encoder."):
            single += [*each.down.parameters(), *each.up.parameters()]
    places = [each.place for path, each in operators.items() if path.startswith("decoder.")]
    heads = [network.down.bias, network.up.bias, network.down.weight, network.up.weight]
    return [*([each] for each in single), places, *([each] for each in heads)]


def turned(value: Tensor, number: int, count: int, back: bool = False) -> Tensor:
    """A parameter of theirs as ours is, or `back`: the heads, which come last, make transposed matrices."""
    if number < count - 4:
        return value
    shape = (2, 8) if ((count - number) % 2 == 1) != back else (8, 2)  # theirs of W_up is [r, d], of W_down [d, r]
    return value.unflatten(0, shape).transpose(0, 1).flatten(0, 1)


@against("authors", "pha", **CODE)
def test_numbers_of_the_authors() -> None:
    """States, losses and gradients in training."""
    model = t5().train()
    stacks = [(name, dict(getattr(model, name).named_parameters())) for name in ("encoder", "decoder")]
    table = model.shared.weight
    host = [known[name] for _, known in stacks for name in sorted(known) if not name.startswith("embed_tokens")]
    for each, value in zip([table, *host], waves([p.shape for p in [table, *host]], 0.31, 0.5), strict=True):
        each.data = value
    for name in ("encoder", "decoder"):
        getattr(model, name).embed_tokens.weight = table
    options = {"tasks": ["a", "b", "c"], "bottleneck": 2}
    injection: Any = peftcore.apply(model, "pha", **options, dtype="float64")
    every = parts(injection)
    assert sum(len(rows) for rows in every) == sum(p.requires_grad for p in injection.parameters())
    shapes = [rows[0].shape if len(rows) == 1 else (len(rows), *rows[0].shape) for rows in every]
    for number, (rows, value) in enumerate(zip(every, waves(shapes, 0.53, 0.3), strict=True)):
        value = turned(value, number, len(every)) if len(rows) == 1 else value
        for row, own in zip(rows, [value] if len(rows) == 1 else value, strict=True):
            row.data.copy_(own)
    table.requires_grad_()
    with peftcore.call(model, task=TASKS):
        output = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=ANSWERS, output_hidden_states=True)
    y, loss = output.decoder_hidden_states[-1], injection.losses()
    ((y * wave(*y.shape, step=0.23)).sum() + loss).backward()
    found = {"y": thin(y), "loss": [loss.item()], "words": thin(table.grad)}
    for number, rows in enumerate(every):
        gradients: list[Any] = [row.grad for row in rows]
        theirs = turned(gradients[0], number, len(every), back=True) if len(rows) == 1 else torch.stack(gradients)
        found[str(number)] = thin(theirs)
    numbers = frozen(NUMBERS)
    assert numbers.keys() == found.keys()
    for name, value in numbers.items():
        assert max(map(abs, value)) > 1e-4, name
        assert found[name] == pytest.approx(value, rel=1e-8, abs=1e-9), name


@against("authors", "pha", **CODE, part="start")
def test_start_is_the_authors() -> None:
    told, options = frozen(NUMBERS, "start"), {"tasks": 200, "bottleneck": 256}
    injection: Any = peftcore.apply(t5(d_model=256, num_layers=1), "pha", **options)
    shared = injection.shared
    retriever, network = shared["retriever"], shared["network/256/256"]
    own = next(each for path, each in injection.operators.items() if path.startswith("encoder.block"))
    found = {f"own.{name}": each for name, each in own.named_parameters()}
    found |= {f"retriever.{name}": each for name, each in retriever.named_parameters()}
    found |= {**dict(network.named_parameters()), "prototypes.weight": shared["prototypes"].value}
    wide = peftcore.apply(t5(num_layers=1), "pha", tasks=1, task_width=20000, hidden=1)
    found["place.weight"] = next(
        each.place for path, each in wide.operators.items() if path.startswith("decoder.block")
    )
    for name, value in told.items():
        same_start(found[name], value)


@against("authors", "pha", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Matrices of the decoder's adapters that train there, and that nothing reads, are not counted."""
    injection: Any = peftcore.apply(t5(), "pha", tasks=3, bottleneck=2)
    trained = {id(each): each.numel() for each in injection.parameters() if each.requires_grad}
    owners = [each for path, each in injection.operators.items() if path.startswith("encoder.block")]
    encoder = sum(trained.pop(id(value)) for each in owners for value in each.parameters())
    assert {"encoder": encoder, "decoder": sum(trained.values())} == frozen(NUMBERS, "trains")


@against("authors", "pha", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    otherwise = {"tasks": "theirs are those of GLUE; here none is known"}
    same_defaults(peftcore.apply(t5(), "pha").config, frozen(NUMBERS, "defaults"), otherwise=otherwise)


def test_the_losses_row_by_row() -> None:
    """With tasks that have one row or none, and with a single row."""
    torch.manual_seed(0)
    prototypes = torch.randn(4, 5).double()
    for tasks in ([0, 2, 0, 0, 3, 2], [1]):
        v = torch.randn(len(tasks), 5).double().requires_grad_()
        instances, to_prototypes = [], []
        for i, task in enumerate(tasks):
            near = [math.exp(torch.cosine_similarity(v[i], other, dim=0).item() / 0.3) for other in v]
            friends = [j for j in range(len(tasks)) if j != i and tasks[j] == task]
            others = sum(near) - near[i]
            if friends:
                instances.append(sum(math.log(others / near[j]) for j in friends) / len(friends))
            near = [math.exp(torch.cosine_similarity(v[i], each, dim=0).item() / 0.3) for each in prototypes]
            to_prototypes.append(math.log((sum(near) - near[task]) / near[task]))
        expected = sum(instances) / max(len(instances), 1) + sum(to_prototypes) / len(tasks)
        loss = contrast(v, torch.tensor(tasks), prototypes, 0.3)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        loss.backward()
        assert v.grad is not None and v.grad.isfinite().all() and v.grad.abs().max() > 1e-3


def expected_loss(injection: Any, means: Tensor, tasks: list[int]) -> Tensor:
    vectors = injection.shared["retriever"](means)
    return 0.1 * contrast(vectors, torch.tensor(tasks), injection.shared["prototypes"].value, 0.1)


def applied(model: Any, **options: Any) -> Any:
    injection = peftcore.apply(model.double().train(), "pha", **{**SMALL, **options}, dtype="float64")
    fill(injection)
    return injection


def test_a_causal_stack_is_read_up_to_the_first_label() -> None:
    """Without padding; in training alone, and not with one task."""
    model: Any = HOSTS["llama"].build()[0]
    injection = applied(model)
    labels = torch.tensor([[-100, -100, 3, 8], [-100, 9, 4, -100], [-100, -100, -100, 0], [-100, 6, -100, -100]])
    given = {"input_ids": IDS, "attention_mask": MASK}
    with peftcore.call(model, task=TASKS):
        states = model(**given, output_hidden_states=True).hidden_states[-1]
        whole = injection.losses()
        loss = model(**given, labels=labels).loss
        with peftcore.call(model, prompt_length=[2, 1, 3, 1]):
            model(**given)
            told = injection.losses()
        with torch.no_grad():
            injection.shared["retriever"].second.weight.mul_(-1)
        more = model(**given, labels=labels).loss
    with torch.no_grad():
        injection.shared["retriever"].second.weight.mul_(-1)
    ends = [2, 1, 3, 1]
    means = torch.stack([row[:end].mean(0) for row, end in zip(states, ends, strict=True)])
    torch.testing.assert_close(told, expected_loss(injection, means, TASKS))
    means = torch.stack([row[: int(mask.sum())].mean(0) for row, mask in zip(states, MASK, strict=True)])
    torch.testing.assert_close(whole, expected_loss(injection, means, TASKS))
    assert abs(loss - more) > 1e-3, "the host's loss has it"
    with peftcore.call(model.eval(), task=TASKS):
        model(**given)
    assert injection.losses() == 0
    injection.remove()
    alone: Any = peftcore.apply(model.train(), "pha", **{**SMALL, "tasks": 1})
    model(**given)
    assert alone.losses() == 0 and "retriever" not in alone.shared


def test_without_tokens_the_last_adapter_is_read() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)]
    model = nn.Sequential(*layers)
    injection = applied(model, target=["0", "1"])
    x = torch.randn(4, 3, 6).double()
    with peftcore.call(model, task=TASKS):
        model(x)
        h = model[0](x)
    torch.testing.assert_close(injection.losses(), expected_loss(injection, h.mean(1), TASKS))


def test_a_picture_is_read_behind_its_last_norm() -> None:
    model: Any = HOSTS["vit"].build()[0]
    injection = applied(model)
    pictures, seen = torch.randn(4, 1, 8, 8).double(), []
    hook = model.get_submodule("vit.layernorm").register_forward_hook(lambda module, args, output: seen.append(output))
    with peftcore.call(model, task=TASKS):
        model(pixel_values=pictures)
    hook.remove()
    torch.testing.assert_close(injection.losses(), expected_loss(injection, seen[0].mean(1), TASKS))


def test_which_adapters_are_made() -> None:
    """Those of the decoder; where only that is targeted, the retriever reads the encoder too."""
    model, inputs = HOSTS["t5"].build()
    injection: Any = peftcore.apply(model, "pha", **SMALL)
    adapters = {path: each for path, each in injection.operators.items() if path != "encoder"}
    assert {path for path, each in adapters.items() if each.network is None} == {
        path for path in adapters if path.startswith("encoder.")
    }
    assert len(adapters) == 4 and [*injection.shared] == ["prototypes", "retriever", "network/16/16"]
    injection.remove()
    injection = peftcore.apply(model.train(), "pha", **SMALL, target="decoder.block.*.DenseReluDense.wo")
    assert [path.partition(".")[0] for path in injection.operators] == ["encoder", "decoder", "decoder"]
    with peftcore.call(model, task=1):
        model(**inputs)
    assert injection.losses() != 0


def test_beams_keep_the_tasks_of_their_rows() -> None:
    torch.manual_seed(2)
    model, inputs = HOSTS["t5"].build()
    injection = peftcore.apply(model.eval(), "pha", **SMALL)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 1.5)
    assert_beams_keep_the_tasks_of_their_rows(model, inputs["input_ids"], [2, 0])


def test_more_rows_than_tasks_and_one_task_for_all() -> None:
    """Weights that are made for all tasks are those that are made for one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    applied(model, target="0")
    x, tasks = torch.randn(7, 6).double(), [0, 2, 1, 1, 0, 2, 2]
    with peftcore.call(model.eval(), task=tasks):
        together = model(x)
    for row, task in enumerate(tasks):
        with peftcore.call(model, task=task):
            torch.testing.assert_close(model(x[row]), together[row])
            torch.testing.assert_close(model(x)[row], together[row])


def test_how_it_starts() -> None:
    injection: Any = peftcore.apply(t5(), "pha", tasks=200, bottleneck=20)
    network = injection.shared["network/8/8"]
    for head, fan in ((network.down, 8), (network.up, 20), (network.down_bias, 1), (network.up_bias, 1)):
        bound = 1e-3 * math.sqrt(3 / (64 * fan))
        assert 0.95 * bound < head.weight.abs().max() <= bound and not head.bias.any()
    own = injection.operators["encoder.block.0.layer.1.DenseReluDense.wo"]
    assert 0 < own.up.weight.abs().max() <= 1e-4 * math.sqrt(6 / 28) and not own.up.bias.any()
    assert 0.95 < injection.shared["prototypes"].value.std() < 1.05


def test_what_it_refuses() -> None:
    model, inputs = HOSTS["llama"].build()
    with pytest.raises(ConfigError, match="takes no overrides"):
        peftcore.apply(model, "pha", overrides={"*": {"bottleneck": 3}})
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = transformers.BertModel(transformers.BertConfig(vocab_size=9, **config), add_pooling_layer=False)
    two = nn.ModuleDict({"one": model, "other": tower})
    with pytest.raises(UnsupportedSite, match="get different tokens"):
        names = ["one.model.layers.*.mlp.down_proj", "other.encoder.layer.*.output.dense"]
        peftcore.apply(two, "pha", target=names, **SMALL)
    assert not peftcore.injections(model) and not peftcore.injections(two)
    peftcore.apply(model, "pha", **SMALL)
    with pytest.raises(MissingContext, match="needs the task"):
        model(**inputs)
