"""SPT-LoRA: the places that the authors' code chooses by the same gradients, and files of what data chose."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from numbers_of import module_of
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import peftcore
from peftcore.errors import CalibrationError
from peftcore.testing import HOSTS, against, conformance, frozen
from peftcore.testing.kit import fill
from peftcore_vision._sensitivity import allotted, sensitivities
from peftcore_vision.spt_lora import EntriesOperator, UpdateOperator

NUMBERS = Path(__file__).parent / "numbers" / "spt_lora.json"
RANK, EASE, VECTOR_EASE = 32, 2.0, 5.0
"""Those of the frozen numbers."""
PARTS = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The matrices of a block in the order of the authors' table."""
EVERYWHERE = {"share": 1.0, "rank": 2}
"""What is chosen is in the options, of which the kit expects that they are as it gave them: here data changes none."""


@conformance("spt_lora", options={"*": EVERYWHERE})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def theirs(path: str) -> str:
    """The authors' name of the tensor of a site: ``blocks.0.attn.qkv.bias:attn.q`` is ``blocks.0.attn.q.bias``."""
    whole, _, part = path.partition(":")
    name = whole.replace("attn.qkv", part) if part else whole
    return name if name.endswith("bias") else f"{name}.weight"


def model_and_data() -> tuple[nn.Module, list[Any]]:
    """The authors' transformer, with the fused matrices of timm, and their two batches."""
    script = module_of("spt_lora")
    model = VisionTransformer(**script.SIZES).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn.qkv" in name:
                shape = (parameter.shape[0] // 3, *parameter.shape[1:])
                each = [script.wave(shape, name.replace("qkv", part)) for part in "qkv"]
                parameter.copy_(torch.cat(each) / 4)
            else:
                parameter.copy_(script.wave(parameter.shape, name) / 4)
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


@against("authors", "spt_lora", repository="ziplab/SPT", commit="e385f67", script="engine.py")
@pytest.mark.parametrize("budget", ["0.05", "0.1", "0.2"])
def test_the_authors_choice_of_places(budget: str) -> None:
    """From the same gradients and as many of the largest: matrices, vectors, entries."""
    numbers = frozen(NUMBERS)[budget]
    model, data = model_and_data()
    injection = peftcore.apply(model, "spt_lora", data=data, share=1.0, rank=RANK, dtype="float64")
    sites = {graft.site.path: graft.site for graft in injection.grafts}
    injection.remove()
    scores = sensitivities([*sites.values()], peftcore.Batches(model, data, "data"))
    plan = allotted(scores, sites, numbers["tau"], RANK, EASE, VECTOR_EASE)
    whole = [sites[path] for path, count in plan.items() if count is None]
    assert_chosen(
        numbers,
        {theirs(site.path) for site in whole if len(site.weight_shape) > 1},
        {theirs(site.path) for site in whole if len(site.weight_shape) == 1},
        {theirs(path): scores[path].topk(count).indices for path, count in plan.items() if count},
    )


@against("authors", "spt_lora", repository="ziplab/SPT", commit="e385f67", script="engine.py")
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
    with pytest.raises(CalibrationError, match="says nothing of the weights"):
        peftcore.apply(model, "spt_lora", data=[lambda host: 0.0 * host(**inputs).logits.sum()])
