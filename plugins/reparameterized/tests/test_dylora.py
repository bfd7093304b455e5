"""DyLoRA: the promises of the kit, the numbers of the authors' code (`numbers/dylora.json`) and of LyCORIS at each
rank, the equation in float64 on all kinds of layers, and what is drawn."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from equation_in_float64 import KINDS, adapted, experts, fill, frozen, hosted, logical
from lycoris.modules.dylora import DyLoraModule
from one_layer import One
from peft_pairs import difference
from torch import nn
from torch.func import functional_call
from transformers import RobertaConfig, RobertaForSequenceClassification

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import HOSTS, against, conformance, same_defaults, same_start
from peftcore.testing import frozen as kept
from peftcore_reparameterized.dylora import make_lora

EXACT = 1e-12
NUMBERS = Path(__file__).parent / "numbers" / "dylora.json"
SCRIPT = run_path(str(NUMBERS.with_suffix(".py")))
RANK = SCRIPT["RANK"]
CODE: Any = {
    "repository": "huawei-noah/Efficient-NLP",
    "commit": "bb44348",
    "script": "DyLoRA/loralib/layers.py",
}


OPTIONS = {
    "*": {"rank": 3},  # at 8 factors have shapes of weights
    "unet": {
        "rank": 3,
        "block_size": 3,
    },  # no block of one is drawn twice in three steps, and A waits for B
}


@conformance("dylora", options=OPTIONS)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("rank", range(1, RANK + 1))
@pytest.mark.parametrize("mode", ["frozen", "whole", "evaluated"])
@against("authors", "dylora", **CODE)
def test_outputs_and_gradients_are_those_of_the_authors_code(mode: str, rank: int) -> None:
    expected, given = kept(NUMBERS)[f"{mode} {rank}"], SCRIPT["tensors"]()
    host = One(nn.Linear(SCRIPT["INPUTS"], SCRIPT["OUTPUTS"])).double().requires_grad_(False)
    host.layer.load_state_dict({"weight": given["weight"], "bias": given["bias"]})
    options = {"rank": RANK, "alpha": SCRIPT["ALPHA"], "frozen": mode != "whole", "dtype": "float64"}
    injection = peftcore.apply(host, "dylora", target="layer", **options)
    (operator,) = injection.operators.values()
    x = given["x"].requires_grad_()
    before = host(x).detach()
    operator.load_state_dict({"A": given["A"], "B": given["B"]})
    host.train(mode != "evaluated")
    with peftcore.call(host, lora_rank=rank):
        output = host(x)
    (output * SCRIPT["wave"](*output.shape)).sum().backward()
    found = {"output": output, "A": operator.A.grad, "B": operator.B.grad, "x": x.grad}
    assert difference(output, before) > 0.01
    for name, value in expected.items():
        assert difference(found[name].detach(), torch.tensor(value, dtype=torch.float64)) <= EXACT, name


@against("authors", "dylora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    told, injection = kept(NUMBERS, "start"), peftcore.apply(One(nn.Linear(5000, 20)), "dylora", target="layer")
    (operator,) = injection.operators.values()
    same_start(operator.A, told["A"])
    same_start(operator.B, told["B"])


@against("authors", "dylora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Of RoBERTa by default; and the head, which `train` names here."""
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=9, **SCRIPT["SIZES"]))
    head = {name: p.numel() for name, p in model.named_parameters() if "classifier" in name}
    injection, told = peftcore.apply(model, "dylora", rank=2, train=["classifier"]), kept(NUMBERS, "trains")
    factors = {
        f"{path}.lora_{name}": value.numel()
        for path, operator in injection.operators.items()
        if not path.startswith("classifier")
        for name, value in operator.named_parameters()
    }
    assert {**factors, **head} == told
    assert sum(told.values()) == sum(each.numel() for each in injection.parameters())


@against("authors", "dylora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(One(nn.Linear(9, 9)), "dylora", target="layer").config, kept(NUMBERS, "defaults"))


LYCORIS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=2), (2, 4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", LYCORIS)
@against("lycoris 4.1", "dylora")
def test_beside_lycoris(name: str) -> None:
    """Outputs and gradients in training at each rank, of linear maps and convolutions."""
    base, x = frozen(*LYCORIS[name])
    module = DyLoraModule("layer", deepcopy(base.layer), 1.0, RANK, 3.0, block_size=1).double()
    model = deepcopy(base)
    injection = peftcore.apply(model, "dylora", target="layer", rank=RANK, alpha=3.0, dtype="float64")
    (operator,) = injection.operators.values()
    fill(operator)
    with torch.no_grad():
        for row, (down, up) in enumerate(zip(module.down_list, module.up_list, strict=True)):
            down.copy_(operator.A[row].reshape(1, -1))
            up.copy_(operator.B[:, row : row + 1])
    model.train()
    for rank in range(1, RANK + 1):
        module.zero_grad()
        operator.zero_grad()
        weight = module.get_merged_weight(rank=rank - 1)[0]
        expected = functional_call(base, {"layer.weight": weight}, (x,))
        with peftcore.call(model, lora_rank=rank):
            ours = model(x)
        assert difference(ours, base(x)) > 1e-3
        assert difference(ours, expected) <= EXACT
        direction = torch.randn_like(ours)
        for output in (ours, expected):
            (output * direction).sum().backward()
        for row, (down, up) in enumerate(zip(module.down_list, module.up_list, strict=True)):
            here = row == rank - 1
            assert (operator.A.grad[row].abs().max() > 0) == (operator.B.grad[:, row].abs().max() > 0) == here
            if here:
                assert difference(operator.A.grad[row].reshape(1, -1), down.grad) <= EXACT
                assert difference(operator.B.grad[:, row : row + 1], up.grad) <= EXACT


@pytest.mark.parametrize("rank", [2, 4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str, rank: int) -> None:
    """At each rank of blocks of two, in training and afterwards; gradients of the block alone, or of all."""
    base, x = hosted(kind)
    for whole in (False, True):
        options = {"rank": 6, "alpha": 5.0, "block_size": 2, "frozen": not whole}
        host, injection, operator = adapted(kind, "dylora", **options)
        fill(operator)
        copy = deepcopy(operator)
        cut = [(w, t["A"][:rank].flatten(1), t["B"][:, :rank]) for w, t in experts(kind, copy)]
        made = [w + 5.0 / rank * (B @ A).view(w.shape) for w, A, B in cut]
        effective = torch.stack(made) if kind == "experts" else made[0]
        stored = effective.T if KINDS[kind].transposed else effective
        expected = functional_call(base, {KINDS[kind].tensor: stored}, (x,))
        with peftcore.call(host, lora_rank=rank):
            assert difference(host.eval()(x), expected) <= EXACT
            ours = host.train()(x)
        assert difference(ours, base(x)) > 1e-3
        assert difference(ours, expected) <= EXACT
        direction = torch.randn_like(ours)
        for output in (ours, expected):
            (output * direction).sum().backward()
        dim = operator.layer.batch_dims
        for own, other, at in ((operator.A, copy.A, dim), (operator.B, copy.B, -1)):
            kept, block, left = own.grad.split([rank - 2, 2, 6 - rank], at)
            before, its, _ = other.grad.split([rank - 2, 2, 6 - rank], at)
            assert its.abs().max() > 0
            assert difference(block, its) <= EXACT
            assert not left.abs().sum()
            assert difference(kept, before) <= EXACT if whole and rank > 2 else not kept.abs().sum()
        lora = make_lora(injection, rank)
        assert lora.method.name == "lora"
        assert difference(host.eval()(x), expected) <= EXACT
        lora.merge()
        assert difference(logical(kind, host), effective) <= EXACT


def llama(**options: Any) -> tuple[Any, dict[str, Any], peftcore.Injection]:
    model, inputs = HOSTS["llama"].build()
    model = model.double()
    injection = peftcore.apply(model, "dylora", rank=6, block_size=2, seed=1, dtype="float64", **options)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model, inputs, injection


def test_each_forward_in_training_has_a_rank_of_its_own_everywhere() -> None:
    """Evenly drawn by torch's generator; out of training all ranks act."""
    model, inputs, injection = llama()
    seen: list[int] = []
    for operator in injection.operators.values():
        draw = operator.draw
        operator.draw = lambda running, draw=draw: (rank := draw(running), seen.append(int(rank)))[0]
    sites = len(injection.operators)
    for seed in range(120):
        torch.manual_seed(seed)
        output = model.train()(**inputs).logits
        (rank,) = set(seen[-sites:])
        with peftcore.call(model, lora_rank=rank):
            assert difference(output, model(**inputs).logits) <= EXACT
    counts = Counter(seen)
    assert set(counts) == {2, 4, 6} and max(counts.values()) < 2 * min(counts.values())
    del seen[:]
    model.train().model(**inputs)  # a part by itself
    assert len(seen) == sites
    del seen[:]
    model.eval()(**inputs)
    assert not seen


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_backward_computes_again_has_the_same_rank(reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model, inputs, injection = llama()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(2)
        sum(model(**inputs).logits.square().sum() for _ in range(3)).backward()
        results.append([p.grad for p in injection.parameters()])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-9, atol=1e-9)


def test_ranks_that_there_are_not_are_refused() -> None:
    host = One(nn.Linear(12, 7))
    with pytest.raises(ConfigError, match="rank=6 is not a multiple of block_size=4"):
        peftcore.apply(host, "dylora", target="layer", rank=6, block_size=4)
    injection = peftcore.apply(host, "dylora", target="layer", rank=6, block_size=2)
    for rank in (0, 3, 8):
        with peftcore.call(host, lora_rank=rank), pytest.raises(ConfigError, match=f"rank {rank} is not one of 2, 4"):
            host(torch.randn(2, 12))
        with pytest.raises(ConfigError, match=f"rank {rank} is not one of 2, 4"):
            make_lora(injection, rank)
    with pytest.raises(ConfigError, match="needs a dylora"):
        make_lora(peftcore.apply(One(nn.Linear(4, 4)), "lora", target="layer"), 2)


def test_sites_of_other_ranks_follow_what_is_drawn() -> None:
    model, inputs, injection = llama(overrides={"*.q_proj": {"rank": 2, "block_size": 1}})
    seen: dict[int, set[int]] = {}
    for operator in injection.operators.values():
        draw = operator.draw
        noted = seen.setdefault(operator.rank, set())
        operator.draw = lambda running, noted=noted, draw=draw: (rank := draw(running), noted.add(int(rank)))[0]
    for _ in range(20):
        model.train()(**inputs)
    assert seen == {2: {1, 2}, 6: {2, 4, 6}}
