"""EVA beside peft's: directions, ranks, what it computes then; beside a decomposition of all inputs at once."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.utils.incremental_pca import IncrementalPCA
from peft_folders import assert_same, fill
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import CalibrationError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
SAME = "the kit's batches differ in what counts of the output; the inputs, which is what this looks at, are the same"
SEEN = "what a host in half precision shows of its inputs is rounded, so the directions are others"
ROUNDED = ("mlp", "llama", "bert", "t5", "gpt2", "moe", "mistral", "vit", "unet", "dit")
FIXED = {"rank": 2, "rho": 1.0}
"""Ranks that data finds are in the options, of which the kit expects that they are as it gave them."""


@conformance(
    "eva",
    options={"*": FIXED},
    expected_failures={
        **{f"data_counts_where_it_is_asked_for-{each}": SAME for each in ("mlp", "llama")},
        **{f"merging_rounds_once-{each}": SEEN for each in ROUNDED},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


TAU = 0.8


def exact(*args: Any, **options: Any) -> IncrementalPCA:
    return IncrementalPCA(*args, **{**options, "lowrank": False})


def llama() -> nn.Module:
    torch.manual_seed(0)
    return HOSTS["llama"].build()[0].eval()


def batches(padded: bool = False, labels: bool = False) -> list[dict[str, Tensor]]:
    """Three, of which rows are padded in the end, and some positions are not learned."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = llama().config.vocab_size
    found = []
    for _ in range(3):
        ids = torch.randint(vocabulary, (6, 12), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if padded:
            batch["attention_mask"][:3, 8:] = 0
        if labels:
            batch["labels"] = ids.clone()
            batch["labels"][:, :3] = -100
        found.append(batch)
    return found


def theirs(targets: list[str], data: list[dict[str, Tensor]], rank: int, **options: Any) -> nn.Module:
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=6,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(**{"tau": TAU, **options}),
    )
    model = peft.get_peft_model(llama(), config)
    initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


def layers(model: nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }


PEFTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, bool]]] = {
    "as it comes": ({}, {}, {}),
    "padded": ({}, {}, {"padded": True}),
    "labels": ({}, {}, {"padded": True, "labels": True}),
    "all labels": ({"use_label_mask": False}, {"use_label_mask": False}, {"labels": True}),
    "whitened": ({"whiten": True}, {"whiten": True}, {}),
    "its own scale": ({"adjust_scaling_factors": False}, {"keep_scale": False}, {}),
    "no other ranks": ({"rho": 1.0}, {"rho": 1.0}, {}),
    "far": ({"rho": 3.0}, {"rho": 3.0}, {}),
}


@pytest.mark.parametrize("case", PEFTS)
@against("peft 0.21", "eva")
def test_beside_peft(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which modules have which rank and scale, from which directions they start; then outputs and gradients, with noise
    in both. Both decompose exactly: the approximations draw from other generators."""
    monkeypatch.setattr(peft.tuners.lora.eva, "IncrementalPCA", exact)
    their_options, options, data = PEFTS[case]
    targets = ["q_proj", "o_proj", "down_proj"]
    other = theirs(targets, batches(**data), 3, **their_options)
    model = llama()
    injection = peftcore.apply(
        model, "eva", target=targets, data=batches(**data), rank=3, alpha=6.0, tau=TAU, iterations=None, **options
    )
    adapted = layers(other)
    assert injection.operators.keys() == adapted.keys()
    ranks = {path: operator.A.shape[0] for path, operator in injection.operators.items()}
    assert (len(set(ranks.values())) > 1) == (case != "no other ranks"), "nothing was redistributed"
    generator, pairs = torch.Generator().manual_seed(3), []
    for path, operator in injection.operators.items():
        A, B = adapted[path].lora_A["default"].weight, adapted[path].lora_B["default"].weight
        assert ranks[path] == A.shape[0] and operator.scale == pytest.approx(adapted[path].scaling["default"])
        assert difference(operator.A, A) <= 1e-3
        assert not operator.B.any() and not B.any()
        for own, given in ((operator.A, A), (operator.B, B)):
            own.data.normal_(0, 0.1, generator=generator)
            given.data.copy_(own)
            pairs.append((own, given))
    count = sum(p.numel() for p in other.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in injection.parameters()) == sum(own.numel() for own, _ in pairs)
    inputs = batches()[0]
    for training in (False, True):
        ours, expected = (each.train(training)(**inputs).logits for each in (model, other))
        assert difference(ours, llama()(**inputs).logits) >= 1e-2
        assert difference(ours, expected) <= 1e-5
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    assert all(difference(own.grad, given.grad) <= 1e-4 for own, given in pairs)


@against("peft 0.21", "eva")
def test_modules_with_one_input_beside_peft() -> None:
    """Of directions that explain equally much, peft gives some module the last one, and here the first has it."""
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    other = layers(theirs(targets, batches(), 3))
    injection = peftcore.apply(llama(), "eva", target=targets, data=batches(), rank=3, alpha=6.0, tau=TAU)

    def by_input(ranks: dict[str, int]) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {}
        for path, rank in ranks.items():
            groups.setdefault(path.rpartition(".")[0], []).append(rank)
        return {parent: sorted(each, reverse=True) for parent, each in groups.items()}

    ours = {path: operator.A.shape[0] for path, operator in injection.operators.items()}
    assert by_input(ours) == by_input({path: layer.r["default"] for path, layer in other.items()})
    for path, operator in injection.operators.items():
        widest = max(
            (each for each in other if each.rpartition(".")[0] == path.rpartition(".")[0]),
            key=lambda p: other[p].r["default"],
        )
        assert difference(operator.A, other[widest].lora_A["default"].weight[: ours[path]]) <= 1e-3


class Two(nn.Module):
    """Two layers, of which the second one's inputs hardly vary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(6, 5), nn.Linear(5, 4), nn.Embedding(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.table(x) if x.dtype == torch.long else x)))


def host() -> nn.Module:
    torch.manual_seed(0)
    return Two().double().requires_grad_(False)


def test_components_are_those_of_all_inputs_at_once() -> None:
    """With as many as there are inputs, nothing is left out from batch to batch."""
    generator = torch.Generator().manual_seed(2)
    data = [(torch.randn(n, 6, generator=generator).double() * torch.arange(1, 7) + n,) for n in (40, 30, 50)]
    options: dict[str, Any] = {"iterations": None, "passes": 1, "tau": 1.0, "dtype": "float64", "rank": 6}
    injection = peftcore.apply(host(), "eva", target="first", data=data, rho=1.0, **options)
    (operator,) = injection.operators.values()
    covariance = torch.cat([x for (x,) in data]).T.cov()
    expected = torch.linalg.eigh(covariance).eigenvectors.flip(1).T  # the largest first
    cosines = (operator.A * expected).sum(1).abs()
    assert (cosines - 1).abs().max() <= 1e-10
    assert (operator.A.gather(1, operator.A.abs().argmax(1, keepdim=True)) > 0).all()


class Three(nn.Module):
    """Three layers with an input of their own each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[..., :2]) + self.second(x[..., 2:4]) + self.third(x[..., 4:])


def test_a_module_of_no_rank_gets_no_adapter_and_the_file_says_it(tmp_path: Path) -> None:
    """Each of two directions explains half, each of six a sixth."""
    torch.manual_seed(0)
    base, data = Three(), [(torch.randn(500, 10),)]
    model = deepcopy(base)
    injection = peftcore.apply(model, "eva", target=["first", "second", "third"], data=data, rank=1, alpha=3.0)
    assert {path: operator.A.shape[0] for path, operator in injection.operators.items()} in (
        {"first": 2, "second": 1},
        {"first": 1, "second": 2},
    )
    assert all(operator.scale == 3.0 for operator in injection.operators.values())
    for parameter in injection.parameters():
        parameter.data.normal_()
    injection.save(tmp_path)
    again = deepcopy(base)
    loaded = peftcore.load(again, tmp_path)
    assert torch.equal(again(data[0][0]), model(data[0][0]))
    assert loaded.config.overrides == injection.config.overrides
    mine = {"target": ["first", "second", "third"], "rank": 1, "overrides": {"third": {"rank": 3}}}
    injection = peftcore.apply(deepcopy(base), "eva", data=data, **mine)
    assert injection.operators["third"].A.shape[0] == 3, "what the user says of a module stays"
    assert {injection.operators[path].A.shape[0] for path in ("first", "second")} == {1}


def test_sums_of_ranks_and_scales() -> None:
    injection = peftcore.apply(llama(), "eva", target="all-linear", data=batches(), rank=2, alpha=6.0, rho=4.0)
    ranks = [operator.A.shape[0] for operator in injection.operators.values()]
    planned = peftcore.plan(llama(), "eva", target="all-linear", rank=2)
    assert sum(ranks) == 2 * len(planned.sites) and len(set(ranks)) > 2 and max(ranks) <= 8
    assert {operator.scale for operator in injection.operators.values()} == {3.0}


def test_what_has_no_vectors_starts_as_lora() -> None:
    data = [(torch.randint(7, (9, 8)),)]
    injection = peftcore.apply(host(), "eva", target=["table", "first"], data=data, rank=2, rho=1.0, passes=1)
    table = injection.operators["table"]
    assert not table.A.any() and table.B.any()
    assert not injection.operators["first"].B.any()
    with pytest.raises(UnsupportedSite, match="no inputs to look at"):
        peftcore.apply(host(), "eva", target="table", data=data)


def test_data_that_is_of_no_use() -> None:
    torch.manual_seed(0)
    parts = [(each,) for each in torch.randn(6, 6).double().split(3)]
    with pytest.raises(CalibrationError, match="first needs 4 tokens"):
        peftcore.apply(host(), "eva", target="first", data=parts[:1], rank=2, passes=1)
    few = peftcore.apply(host(), "eva", target="first", data=parts, rank=2, passes=1).operators["first"].A
    whole = torch.cat([part for (part,) in parts])
    torch.testing.assert_close(
        few, peftcore.apply(host(), "eva", target="first", data=[(whole,)], rank=2, passes=1).operators["first"].A
    )
    injection = peftcore.apply(host(), "eva", target="first", data=[(torch.randn(9, 6).double(),)], rank=9)
    assert injection.operators["first"].A.shape == (6, 6), "there are no more directions"


def test_a_part_of_a_hybrid_keeps_its_ranks() -> None:
    data = [(torch.randn(30, 6).double(),)]
    parts = [{"method": "eva", "rank": 2, "target": ["first", "second"]}, {"method": "bitfit", "head": False}]
    injection = peftcore.apply(host(), "config_union", parts=parts, data=data)
    rows = [operator.A for operator in injection.operators.values() if hasattr(operator, "A")]
    assert [tuple(A.shape) for A in rows] == [(2, 6), (2, 5)]
    assert all(difference(A @ A.T, torch.eye(2)) <= 1e-5 for A in rows)


def test_files_of_peft(tmp_path: Path) -> None:
    """An adapter of peft's EVA is a LoRA, of a rank in each module, and so is one of ours."""
    inputs = batches()[0]
    other = theirs(["q_proj", "o_proj", "down_proj"], batches(), 3).eval()
    fill(parameter for parameter in other.parameters() if parameter.requires_grad)
    other.save_pretrained(str(tmp_path / "theirs"))
    base, ours = llama(), llama()
    loaded = peftcore.load(ours, tmp_path / "theirs")
    assert loaded.method.name == "lora" and len({operator.A.shape[0] for operator in loaded.operators.values()}) > 1
    assert_same(base(**inputs).logits, ours(**inputs).logits, other(**inputs).logits)
    for scaling in ("rank", "sqrt_rank"):
        options = {"rank": 3, "alpha": 6.0, "scaling": scaling, "dropout": 0.1, "rho": 3.0}
        written = llama()
        injection = peftcore.apply(written, "eva", target="all-linear", data=batches(), **options)
        fill(injection.parameters())
        injection.save(tmp_path / scaling, format="peft")
        read = peft.PeftModel.from_pretrained(llama(), str(tmp_path / scaling)).eval()
        assert_same(base(**inputs).logits, written.eval()(**inputs).logits, read(**inputs).logits)
