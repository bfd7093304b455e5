"""FISH Mask: the kit; the mask of the authors' code; which weights are chosen, and training them, written a second
time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import CalibrationError
from peftcore.testing import against, conformance, frozen, same_defaults
from peftcore.testing.hosts import HOSTS

NUMBERS = Path(__file__).parent / "numbers" / "fish_mask.json"
CODE: Any = {
    "repository": "varunnair18/FISH",
    "commit": "b5bff1e",
    "script": "transformers/examples/text-classification/run_glue_sparse_update.py",
}
SHARE = 0.6
"""Enough for the tied table to have some of it."""

MOVED = "torch cuts the ties of a host that moves to the meta device, so one table counts as three"
TIED = "a table is one weight: where one of its places is left out, the others still have it trained, everywhere"
PATCHES = "the module that embeds patches has the class token, so it runs for all rows once an injection"
ALL = "all weights train in these runs, so data has nothing to choose"


# All weights: of a fraction, gradients in half precision choose others than those in float32, and the kit compares the
# two. The tests below are of fractions.
@conformance(
    "fish_mask",
    options={"*": {"share": 1.0}, "task": {"share": 0.05}},
    expected_failures={
        "each_pays_for_its_own_rows-vit": PATCHES,
        "a_host_without_memory_can_be_planned-t5": MOVED,
        "an_injection_acts_only_where_it_lives-t5": TIED,
        **{f"data_counts_where_it_is_asked_for-{name}": ALL for name in ("mlp", "encoder", "llama")},
    },
)
def test_fish_mask(check: Callable[[], None]) -> None:
    check()


class Stack(nn.Module):
    """A table that is tied to a map, a norm, a convolution and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.tied = nn.Linear(6, 7)
        self.tied.weight = self.table.weight
        self.norm = nn.LayerNorm(7)
        self.conv = nn.Conv1d(7, 4, 2)
        self.classifier = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.norm(torch.tanh(self.tied(self.dropout(self.table(ids)))))  # [batch, length, 7]
        logits = self.classifier(torch.tanh(self.conv(x.mT)).mean(-1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def host() -> Stack:
    torch.manual_seed(0)
    return Stack().double().train()


def examples(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 6, (count, 1, 5), generator=generator)  # the last row of the table is never used
    return [{"ids": each, "labels": torch.tensor([number % 3])} for number, each in enumerate(ids)]


def adapted(**options: Any) -> tuple[Stack, peftcore.Injection]:
    model = host()
    given = {"share": SHARE, "train": ["classifier"], "data": examples(), **options}
    return model, peftcore.apply(model, "fish_mask", dtype="float64", **given)


def expected_masks(share: float = SHARE, data: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
    """Squared gradients of the host itself, one example at a time; one ranking of all but the classifier."""
    model = host().eval()
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("classifier")}
    fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for given in examples() if data is None else data:
        model.zero_grad()
        model(**given)["loss"].backward()
        for name, parameter in parameters.items():
            fisher[name] += parameter.grad**2 / 6
    ranked = sorted(torch.cat([each.flatten() for each in fisher.values()]).tolist(), reverse=True)
    threshold = ranked[int(share * len(ranked)) - 1]
    return {name: each >= threshold for name, each in fisher.items()}


def moved(injection: peftcore.Injection) -> dict[str, Tensor]:
    """Where merging changes the host after the values were moved."""
    nn.init.ones_(injection.shared["mask"].values)
    before = {name: p.detach().clone() for name, p in injection.model.named_parameters() if "peft" not in name}
    injection.merge()
    after = {name: injection.model.get_parameter(name) != value for name, value in before.items()}
    injection.unmerge()
    return {name: changed for name, changed in after.items() if not name.startswith("classifier")}


@pytest.mark.parametrize("share", [0.05, 0.2, SHARE])
def test_the_mask_is_the_largest_of_the_fisher_information(share: float) -> None:
    _, injection = adapted(share=share)
    found, expected = moved(injection), expected_masks(share)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    total = sum(mask.numel() for mask in found.values())
    assert sum(int(mask.sum()) for mask in found.values()) == int(share * total)
    assert injection.shared["mask"].values.shape == (int(share * total),)


@against("authors", "fish_mask", **CODE)
def test_the_mask_of_the_authors_code() -> None:
    """Which of the weights in front of the classifier are kept, where a fifth of them is."""
    found = moved(adapted(share=0.2)[1])
    named = [name for name, _ in host().named_parameters() if not name.startswith("classifier")]
    assert torch.cat([found[name].flatten() for name in named]).nonzero().flatten().tolist() == frozen(NUMBERS)


@against("authors", "fish_mask", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The share of all weights, and the classifier whole, which `train` names here."""
    injection, told = adapted(share=0.2, train=["classifier"])[1], frozen(NUMBERS, "trains")
    assert sum(value.numel() for value in injection.parameters()) == sum(told.values())
    assert injection.shared["mask"].values.numel() == told["else"]


@against("authors", "fish_mask", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    model = host()
    injection = peftcore.apply(model, "fish_mask", data=examples())
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


def test_the_first_samples_alone_count() -> None:
    found = moved(adapted(samples=2)[1])
    expected, other = expected_masks(data=examples()[:2]), expected_masks()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(not torch.equal(found[name], other[name]) for name in found)


def test_batches_are_no_examples() -> None:
    """The squares of means over two examples choose other weights: the docstring says so, and this is why."""
    single = examples()
    pairs = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(single[::2], single[1::2], strict=True)]
    one, other = moved(adapted()[1]), moved(adapted(data=pairs)[1])
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_ten_steps_are_those_of_masked_gradients_in_place() -> None:
    """The authors' training: gradients of all weights, times the mask; the tied table is one weight."""
    model, injection = adapted()
    by_hand, masks = host(), expected_masks()
    base = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
    ours = injection.optimizer(torch.optim.Adam, lr=0.05)
    theirs = torch.optim.Adam(by_hand.parameters(), lr=0.05)
    for step in range(10):
        for each, optimizer in ((model, ours), (by_hand, theirs)):
            torch.manual_seed(step)  # dropout
            optimizer.zero_grad()
            each(**examples()[step % 6])["loss"].backward()
            for name, mask in masks.items() if each is by_hand else ():
                each.get_parameter(name).grad *= mask
            optimizer.step()
    injection.bake()
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=1e-12)
        assert torch.equal(parameter != base[name], masks.get(name, torch.ones_like(parameter, dtype=torch.bool)))


def test_weight_decay_pulls_to_the_base() -> None:
    model, injection = adapted()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "peft" not in name}
    values = injection.shared["mask"].values
    nn.init.ones_(values)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=5.0)
    values.grad = torch.zeros_like(values)
    optimizer.step()
    assert torch.equal(values, torch.full_like(values, 0.5))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in base.items())


def test_parts_of_a_fused_matrix() -> None:
    """Rows of queries alone: the ranking, and what changes."""
    model, inputs = HOSTS["gpt2"].build()
    data = [{**inputs, "labels": inputs["input_ids"]}]
    injection = peftcore.apply(model, "fish_mask", target="attn.q", share=0.5, data=data)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "peft" not in name}
    assert injection.shared["mask"].values.shape == (16 * 16 + 16,)  # half of two matrices and two biases
    nn.init.ones_(injection.shared["mask"].values)
    injection.bake()
    changed = {name: (model.get_parameter(name) != value).nonzero() for name, value in before.items()}
    assert sum(map(len, changed.values())) == 16 * 16 + 16
    assert all(name.endswith(("c_attn.weight", "c_attn.bias")) for name, places in changed.items() if len(places))
    assert all(places[:, -1].max() < 16 for places in changed.values() if len(places))


def test_the_mask_is_kept_in_the_file_and_loading_wants_no_data(tmp_path: Any) -> None:
    model, injection = adapted()
    nn.init.normal_(injection.shared["mask"].values)
    injection.save(tmp_path)
    other = host()
    loaded = peftcore.load(other, tmp_path)
    assert torch.equal(loaded.shared["mask"].index, injection.shared["mask"].index)
    given = examples()[0]
    assert torch.equal(other.eval()(**given)["logits"], model.eval()(**given)["logits"])


def test_a_part_of_the_weights_compiles_and_routes_and_is_rounded_once() -> None:
    """What the kit shows of all weights, of some."""
    (model, first), given = adapted(), examples()[0]
    second = peftcore.apply(model, "fish_mask", share=0.3, data=examples()[:3], dtype="float64", name="second")
    for injection in (first, second):
        nn.init.normal_(injection.shared["mask"].values)
    batch = {key: torch.cat([each[key] for each in examples()[:2]]) for key in given}
    with torch.no_grad():
        alone = []
        for row, name in enumerate(("fish_mask", "second")):
            with peftcore.activate(model.eval(), name):
                alone.append(model(**examples()[row])["logits"])
        with peftcore.route(model, ["fish_mask", "second"]):
            torch.testing.assert_close(model(**batch)["logits"], torch.cat(alone))
        assert (alone[0] - alone[1]).abs().max() > 0.01
    second.remove()
    expected = torch.autograd.grad(model(**given)["loss"], first.shared["mask"].values)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(**given)["loss"], first.shared["mask"].values)[0], expected)
    operator, weight = first.operators["conv"], model.conv.weight.bfloat16()
    assert torch.equal(operator(weight), operator(weight.double()).bfloat16())


def test_other_injections_get_no_gradient_from_the_look_at_the_data() -> None:
    model = host()
    other = peftcore.apply(model, "bitfit")
    peftcore.apply(model, "fish_mask", data=examples())
    assert all(parameter.grad is None for parameter in other.parameters())


def test_data_is_needed() -> None:
    with pytest.raises(CalibrationError, match="data="):
        peftcore.apply(host(), "fish_mask")
