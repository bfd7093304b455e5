"""SPT-LoRA: the places that the authors' code chooses by the same gradients; what their model with such changes
computes and learns, and starts from; what a budget came to in ViT-B/16; and files of what data chose."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from numbers_of import module_of
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import peftcore
from peftcore.errors import CalibrationError, InactiveSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill
from peftcore_vision.spt_lora import EntriesOperator, UpdateOperator, allotted, counts, sensitivities

CODE: Any = {"repository": "ziplab/SPT", "commit": "e385f67", "script": "engine.py"}
NUMBERS = Path(__file__).parent / "numbers" / "spt_lora.json"
RANK, EASE, VECTOR_EASE = 32, 2.0, 5.0
"""Those of the frozen numbers."""
PARTS = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The matrices of a block in the order of the authors' table."""
EVERYWHERE = {"share": 1.0, "rank": 2}
"""What is chosen is in the options, of which the kit expects that they are as it gave them: here data changes none."""
MATRICES = {"target": "all-layers"}
"""Of hosts whose norms alone have roles of the default target."""
ALL = "every matrix has an update and every vector trains in these runs, so data has nothing to choose"


@conformance(
    "spt_lora",
    options={"*": EVERYWHERE, "task": {"share": 0.1}, "mlp": MATRICES, "convnet": MATRICES},
    expected_failures={f"data_counts_where_it_is_asked_for-{host}": ALL for host in ("mlp", "encoder", "llama")},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def theirs(path: str) -> str:
    """The authors' name of the tensor of a site: ``blocks.0.attn.qkv.bias:attn.q`` is ``blocks.0.attn.q.bias``."""
    whole, _, part = path.partition(":")
    name = whole.replace("attn.qkv", part) if part else whole
    return name if name.endswith("bias") else f"{name}.weight"


def timm(sizes: Mapping[str, Any], base: Callable[..., Tensor]) -> nn.Module:
    """The authors' transformer, with the fused matrices of timm; `base` makes tensors of a shape and their name."""
    model = VisionTransformer(**sizes).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn.qkv" in name:
                shape = (parameter.shape[0] // 3, *parameter.shape[1:])
                parameter.copy_(torch.cat([base(shape, name.replace("qkv", part)) for part in "qkv"]))
            else:
                parameter.copy_(base(parameter.shape, name))
    return model


def model_and_data() -> tuple[nn.Module, list[Any]]:
    """Their transformer and their two batches."""
    script = module_of("spt_lora")
    model = timm(script.SIZES, lambda shape, name: script.wave(shape, name) / 4)
    criterion = nn.CrossEntropyLoss()

    def loss(n: int) -> Callable[[nn.Module], Tensor]:
        images, labels = script.wave((2, 3, 8, 8), f"images {n}"), torch.tensor([n % 3, 2])
        return lambda host: criterion(host(images), labels)

    return model, [loss(n) for n in range(2)]


def assert_chosen(
    numbers: Mapping[str, Any], matrices: set[str], vectors: set[str], entries: Mapping[str, Tensor]
) -> None:
    """Check the names, and how many entries stand where, against the authors'."""
    table = (row.split() for row in numbers["matrices"])
    assert matrices == {f"blocks.{block}.{PARTS[int(part)]}.weight" for block, part in table}
    assert vectors == {*numbers["vectors"]}
    assert {name: [len(index), int(index.sum())] for name, index in entries.items()} == numbers["entries"]


@against("authors", "spt_lora", **CODE)
@pytest.mark.parametrize("budget", ["0.05", "0.1", "0.2"])
def test_the_authors_choice_of_places(budget: str) -> None:
    """From the same gradients and as many of the largest: matrices, vectors, entries."""
    numbers = frozen(NUMBERS)[budget]
    model, data = model_and_data()
    injection = peftcore.apply(model, "spt_lora", data=data, share=1.0, rank=RANK, dtype="float64")
    sites = {graft.site.path: graft.site for graft in injection.grafts}
    injection.remove()
    scores = sensitivities([*sites.values()], peftcore.author.Batches(model, data, "data"))
    plan = allotted(next(counts(scores, [numbers["tau"]])), sites, RANK, EASE, VECTOR_EASE)
    whole = [sites[path] for path, count in plan.items() if count is None]
    assert_chosen(
        numbers,
        {theirs(site.path) for site in whole if len(site.weight_shape) > 1},
        {theirs(site.path) for site in whole if len(site.weight_shape) == 1},
        {theirs(path): scores[path].topk(count).indices for path, count in plan.items() if count},
    )


@against("authors", "spt_lora", **CODE)
def test_the_authors_choice_for_a_budget() -> None:
    """Of 0.05 million, at which the steps are theirs."""
    numbers = frozen(NUMBERS)["0.05"]
    model, data = model_and_data()
    skipped = ("head", "cls_token", "patch_embed", "pos_embed")
    every = sum(each.numel() for name, each in model.named_parameters() if not name.startswith(skipped))
    options = {"rank": RANK, "ease": EASE, "vector_ease": VECTOR_EASE, "dtype": "float64"}
    injection = peftcore.apply(model, "spt_lora", data=data, share=5e4 / every, **options)
    found = defaultdict[str, dict[str, Tensor]](dict)
    for path, operator in injection.operators.items():
        if isinstance(operator, UpdateOperator):
            found["matrices"][theirs(path)] = operator.A
        elif isinstance(operator, EntriesOperator):
            kind = "vectors" if operator.size == len(operator.index) else "entries"
            found[kind][theirs(path)] = operator.index
    assert_chosen(numbers, {*found["matrices"]}, {*found["vectors"]}, found["entries"])


def told(model: nn.Module, changes: Mapping[str, int | None]) -> dict[str, dict[str, int | None]]:
    """Overrides with which so many entries of tensors with the authors' names train, or None, and nothing else does."""
    paths = {theirs(site.path): site.path for site in peftcore.plan(model, "spt_lora").sites}
    return {**{paths[name]: {"entries": count} for name, count in changes.items()}, "*": {"entries": 0}}


def tensors(injection: peftcore.Injection) -> dict[str, nn.Parameter]:
    """What trains, by the authors' names."""
    found: dict[str, nn.Parameter] = {}
    for path, operator in injection.operators.items():
        whole = theirs(path)
        module, _, end = whole.rpartition(".")
        head, _, name = module.rpartition(".")
        if isinstance(operator, UpdateOperator):
            for number, factor in enumerate((operator.A, operator.B)):
                found[f"{head}.structured_{name}.learnable.{number}.weight"] = factor
        elif isinstance(operator, EntriesOperator):
            every = len(operator.index) == operator.size
            found[whole if every else f"{module}.sparse_{end}"] = operator.values
    return found


def changed(width: int | None = None, **options: Any) -> Any:
    """Returns an injection with what the authors' model of the script has: updates, entries and whole vectors."""
    script = module_of("spt_lora")
    model = timm({**script.SMALL, "embed_dim": width or script.SMALL["embed_dim"]}, script.base)
    updated = [
        f"blocks.{i}.{PARTS[m]}.weight" for i, row in enumerate(script.UPDATED) for m, one in enumerate(row) if one
    ]
    changes = dict.fromkeys([*updated, *script.WHOLE]) | {name: len(at) for name, at in script.ENTRIES.items()}
    data = [lambda host: host(script.wave((2, 3, 8, 8), "data")).square().sum()]
    options = {"rank": script.RANK, **options, "overrides": told(model, changes), "dtype": "float64"}
    return peftcore.apply(model, "spt_lora", data=data, **options)


@against("authors", "spt_lora", **CODE)
@pytest.mark.parametrize("training", [True, False])
def test_numbers_of_the_authors_model(training: bool) -> None:
    """Updates, entries and whole vectors, several in one fused module; with gradients. Nothing drops in training."""
    script, numbers, injection = module_of("spt_lora"), frozen(NUMBERS)["tuned"], changed()
    model = injection.model
    with torch.no_grad():
        for path, operator in injection.operators.items():
            if theirs(path) in script.ENTRIES:
                operator.get_buffer("index").copy_(torch.tensor(script.ENTRIES[theirs(path)]))
        for name, tensor in tensors(injection).items():
            tensor.copy_(script.wave(tensor.shape, f"change of {name}" if name in script.WHOLE else name))
    x = (4 * script.wave((2, 3, 8, 8), "x")).requires_grad_()
    y = model.train(training)(x)
    (y * script.wave(y.shape, "direction")).sum().backward()
    found = {"y": y, "x": x.grad[0, 0], **{name: each.grad for name, each in tensors(injection).items()}}
    assert found.keys() == numbers.keys()
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value.flatten(), expected, rtol=1e-9, atol=1e-12, msg=name)


@against("authors", "spt_lora", **CODE)
def test_the_authors_number_of_parameters() -> None:
    """What they found for CIFAR-100 in ViT-B/16, where 0.4 million was the budget, with 768 numbers of the token."""
    numbers = frozen(NUMBERS)["cifar"]
    with torch.device("meta"):
        model = VisionTransformer(num_classes=0)
    table = (row.split() for row in numbers["matrices"])
    whole = [f"blocks.{block}.{PARTS[int(part)]}.weight" for block, part in table] + numbers["vectors"]
    changed = dict.fromkeys(whole) | {name: count for name, (count, _) in numbers["entries"].items()}
    plan = peftcore.plan(model, "spt_lora", overrides=told(model, changed))
    assert plan.trainable + 768 == round(numbers["millions"] * 1e6) == 380_909


@against("authors", "spt_lora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """With the deviation of their reset, which `init_std` names here: by default a fresh adapter is an identity."""
    kinds: dict[str, list[Tensor]] = {"A": [], "B": [], "entries": []}
    for operator in changed(width=200, rank=20, init_std=0.02).operators.values():
        if isinstance(operator, UpdateOperator):
            kinds["A"].append(operator.A.flatten())
            kinds["B"].append(operator.B.flatten())
        else:
            kinds["entries"].append(operator.values)
    assert len(kinds["A"]) == sum(map(sum, module_of("spt_lora").UPDATED))
    for kind, told in frozen(NUMBERS, "start").items():
        same_start(torch.cat(kinds[kind]), told)


@against("authors", "spt_lora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """With the head and the class token, which `train` names here."""
    along = ["head", "cls_token"]
    injection = changed(train=along)
    found = {name: each.numel() for name, each in tensors(injection).items()}
    named = injection.model.named_parameters()
    found |= {name: each.numel() for name, each in named if name.startswith(tuple(along)) and ".peft." not in name}
    assert found == frozen(NUMBERS, "trains")
    assert sum(each.numel() for each in injection.parameters()) == sum(found.values())


@against("authors", "spt_lora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    model, data = model_and_data()
    config = peftcore.apply(model, "spt_lora", data=data, share=1.0).config  # all that data could choose
    why = "theirs drops what some updates read, and besides whole updates; ours what it is told"
    same_defaults(config, frozen(NUMBERS, "defaults"), otherwise={"dropout": why})


def small() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, inputs = HOSTS["vit"].build()
    return model.eval(), inputs


def test_files_have_what_data_chose(tmp_path: Path) -> None:
    """Entries, updates and what has neither, at another model without data."""
    model, inputs = small()
    data = [lambda host: host(**inputs).logits.square().mean()]
    injection = peftcore.apply(model, "spt_lora", data=data, share=0.05)
    counts = [options.get("entries") for options in injection.config.overrides.values()]
    assert 0 in counts
    assert any(counts)
    fill(injection)
    expected = model(**inputs).logits
    injection.save(tmp_path / "a")
    other, _ = small()
    loaded = peftcore.load(other, tmp_path / "a")
    assert loaded.config == injection.config
    assert not torch.allclose(small()[0](**inputs).logits, expected)
    torch.testing.assert_close(other(**inputs).logits, expected)
    trained = sum(each.numel() for each in loaded.parameters())
    assert math.isclose(trained, 0.05 * sum(each.numel() for each in model.parameters()), rel_tol=0.5)


def test_data_that_says_nothing_is_an_error() -> None:
    model, inputs = small()
    with pytest.raises(CalibrationError, match="zero gradients in the weights"):
        peftcore.apply(model, "spt_lora", data=[lambda host: 0.0 * host(**inputs).logits.sum()])


@pytest.mark.slow
def test_what_data_chose_merges_routes_and_compiles() -> None:
    """What the kit shows of updates and whole vectors, of entries too."""
    model, inputs = small()
    model.double()
    given = {key: value.double() for key, value in inputs.items()}
    data = [lambda host: host(**given).logits.square().mean()]
    first, second = (
        peftcore.apply(model, "spt_lora", data=data, share=share, dtype="float64", name=name)
        for name, share in (("first", 0.05), ("second", 0.1))
    )
    for injection in (first, second):
        fill(injection)
    alone = []
    with torch.no_grad():
        for name in ("first", "second"):
            with peftcore.activate(model, name):
                alone.append(model(**given).logits)
        rows = [("first", "second")[row % 2] for row in range(len(alone[0]))]
        with peftcore.route(model, rows):
            mixed = model(**given).logits
    torch.testing.assert_close(mixed[::2], alone[0][::2])
    torch.testing.assert_close(mixed[1::2], alone[1][1::2])
    assert (alone[0] - alone[1]).abs().max() > 0.01
    second.remove()
    expected = torch.autograd.grad(data[0](model), list(first.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(data[0](compiled), list(first.parameters())), expected)
    first.merge()
    torch.testing.assert_close(model(**given).logits, alone[0])


def test_inputs_of_updates_are_dropped() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    data = [lambda host: host(torch.ones(2, 6).double()).square().sum()]
    told = {"0.bias": {"entries": 0}, "0": {"entries": None}}
    options = {"target": "0", "rank": 2, "overrides": told, "dtype": "float64"}
    injection = peftcore.apply(model, "spt_lora", data=data, dropout=0.5, **options)
    fill(injection)
    (operator,), x = injection.operators.values(), torch.randn(4, 6, dtype=torch.float64)
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    added = model.train()(x) - plain
    masks = 2 * torch.tensor(list(product((0, 1), repeat=6)), dtype=torch.float64)  # what may be kept, twice
    possible = (x[:, None] * masks) @ operator.A.T @ operator.B.T  # [rows, masks, out]
    misses, kept = (possible - added[:, None]).abs().amax(-1).min(-1)
    torch.testing.assert_close(misses, torch.zeros(4).double())
    assert len(set(kept.tolist())) > 1
    torch.testing.assert_close(model.eval()(x), plain + x @ operator.A.T @ operator.B.T)


def test_entries_of_a_part_of_a_hybrid_are_the_largest() -> None:
    """Told how many, by the gradients of the host alone."""
    model, inputs = small()
    parts = [{"method": "spt_lora", "entries": 3, "batches": 1}, {"method": "bitfit", "target": "head"}]
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("o_proj.weight")]
    losses = [lambda host, n=n: host(**inputs).logits[:, n].square().mean() for n in range(2)]
    expected = [
        each.flatten().abs().topk(3).indices.sort().values for each in torch.autograd.grad(losses[0](model), weights)
    ]
    injection = peftcore.apply(model, "config_union", parts=parts, data=losses)
    found = [each.index for path, each in injection.operators.items() if path.endswith("o_proj")]
    assert len(found) == len(expected) > 1
    assert all(torch.equal(index, places) for index, places in zip(found, expected, strict=True))


def test_a_loss_without_the_targets_is_an_error() -> None:
    model, _ = small()
    head = model.classifier.weight
    with pytest.raises(InactiveSite, match=r"does not depend on vit\.layers\.0\.attention\.q_proj"):
        peftcore.apply(model, "spt_lora", data=[lambda host: head.square().sum()])
