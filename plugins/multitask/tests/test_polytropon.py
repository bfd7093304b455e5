"""Polytropon, multi-head routing and C-Poly: the kit; the real peft and the authors' code, in evaluation and in
training; draws that are computed again; beams; kinds of layers that peft does not know; own skills beside Polytropon by
itself; what is refused. (How tasks are told: test_tasks.py.)"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_pairs import ADAPTER, Both, Pair, difference
from told_tasks import assert_beams_keep_the_tasks_of_their_rows
from torch import Tensor, nn

import peftcore
from peftcore.contract.operators import _Base
from peftcore.errors import ExportError, NotMergeable, UnsupportedSite
from peftcore.targets.sites import Site
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

TASKS, SKILLS, RANK = 4, 3, 3
OPTIONS = {"tasks": TASKS, "skills": SKILLS, "rank": RANK}
NUMBERS = Path(__file__).parent / "numbers" / "polytropon.json"
CODE: Any = {"repository": "McGill-NLP/polytropon", "commit": "d567ea8", "script": "src/polytropon/adapters.py"}


@conformance(
    "polytropon",
    options={
        "*": {**OPTIONS, "splits": 2, "task": 1},
        "llama": {**OPTIONS, "splits": 2, "own_skills": 2, "task": 1},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * step).sin().view(shape)


@pytest.mark.parametrize("mode", ["evaluation", "training"])
@against("authors", "polytropon", **CODE)
def test_numbers_of_the_authors_code(mode: str) -> None:
    """Outputs and gradients for rows of two tasks, in training with the same draws."""
    model = nn.Sequential(nn.Linear(5, 4)).double().train(mode == "training")
    injection = peftcore.apply(model, "polytropon", target="0", **{**OPTIONS, "rank": 2}, dtype="float64")
    operator: Any = injection.operators["0"]
    with torch.no_grad():
        model[0].weight.copy_(wave(4, 5, step=1.1))
        model[0].bias.copy_(wave(4, step=1.3))
        operator.logits.copy_(2 * wave(4, 1, 3, step=0.7))
        operator.A.copy_(wave(1, 3, 2, 5, step=1.7))
        operator.B.copy_(wave(1, 3, 4, 2, step=2.3))
    torch.manual_seed(0)
    with peftcore.call(model, task=[2, 0]):
        y = model(wave(2, 3, 5, step=0.9))
    (y * wave(2, 3, 4, step=0.3)).sum().backward()
    found = {"y": y, "A": operator.A.grad, "B": operator.B.grad, "logits": operator.logits.grad}
    for name, value in frozen(NUMBERS)[mode].items():
        expected = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(found[name].flatten(), expected, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("splits", [1, 4])
@against("authors", "polytropon", **CODE, part="start")
def test_start_is_the_authors(splits: int) -> None:
    """Groups of inputs start as all inputs do, as in the code of the paper about them (microsoft/mttl)."""
    told, options = frozen(NUMBERS, "start"), {"tasks": 4000, "skills": 10, "rank": 2, "splits": splits}
    injection = peftcore.apply(nn.Sequential(nn.Linear(2000, 4)), "polytropon", target="0", **options)
    for name in ("A", "B", "logits"):
        same_start(getattr(injection.operators["0"], name), told[name])


@against("authors", "polytropon", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "polytropon", target="0", **{**OPTIONS, "rank": 16})
    trained = {name: each.numel() for name, each in injection.operators["0"].named_parameters() if each.requires_grad}
    assert trained == frozen(NUMBERS, "trains")


@against("authors", "polytropon", **CODE, part="defaults")
def test_defaults_beside_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "polytropon", target="0")
    reason = "as in peft; the authors' configurations in microsoft/mttl have 1, and say it always"
    same_defaults(injection.config, frozen(NUMBERS, "defaults"), otherwise={"rank": reason})


def pairs(site: Site, operator: _Base, theirs: nn.Module) -> Iterator[Pair]:
    """peft's factors are transposed, and its logits lie in one row a task."""
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.A", operator.A, layer.poly_lora_A[ADAPTER], lambda t: t.mT)
    yield Pair(f"{site.path}.B", operator.B, layer.poly_lora_B[ADAPTER], lambda t: t.mT)
    logits = layer.poly_router[ADAPTER].module_logits
    yield Pair(f"{site.path}.logits", operator.logits, logits, lambda t: t.view(operator.logits.shape))


def both(splits: int, train: bool = False) -> tuple[Both, Callable[..., Callable[[nn.Module], Tensor]]]:
    """llama in both libraries, the logits with a deviation of one, and how it is run with tasks."""
    torch.manual_seed(0)
    base, inputs = HOSTS["llama"].build()
    config = peft.PolyConfig(
        r=RANK, n_tasks=TASKS, n_skills=SKILLS, n_splits=splits, target_modules=["q_proj", "v_proj", "o_proj"]
    )
    options = {**OPTIONS, "splits": splits, "target": ["attn.q", "attn.v", "attn.out"]}
    found = Both(base.train(train), "polytropon", options, config, pairs)
    for pair in found.pairs:
        if pair.name.endswith("logits"):
            found.change(pair.name, lambda t: t.mul_(10))

    def running(told: Any, ids: list[int]) -> Callable[[nn.Module], Tensor]:
        def run(model: nn.Module) -> Tensor:
            if model is found.tuner.model:
                return found.tuner(**inputs, task_ids=torch.tensor(ids)).logits
            with peftcore.call(model, task=told):
                return model(**inputs).logits

        return run

    return found, running


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("splits", [1, 4])
@against("peft 0.21", "polytropon")
def test_peft(splits: int, train: bool) -> None:
    """Outputs and gradients, in training with the same draws: two rows of different tasks."""
    found, running = both(splits, train)
    found.assert_same_gradients(*found.assert_same_outputs(running([3, 1], [3, 1])))


def test_one_task_for_all_rows_and_a_tensor_of_tasks() -> None:
    found, running = both(2)
    for told, ids in ((2, [2, 2]), (torch.tensor([0, 2]), [0, 2])):
        found.assert_same_outputs(running(told, ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_run_again_draw_the_same(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model.train(), "polytropon", **OPTIONS)
    fill(injection)
    found = []
    for again in (False, True):
        if again:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(1)
        with peftcore.call(model, task=[0, 3]):
            output = model(**inputs).logits
        with peftcore.call(model, task=[1, 1]):  # left before backward
            output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in injection.parameters())])
    for plain, repeated in zip(*found, strict=True):
        assert difference(repeated, plain) <= 1e-5 and plain.abs().max() > 0


@pytest.mark.parametrize("host", ["llama", "t5"])
def test_beams_keep_the_tasks_of_their_rows(host: str) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS[host].build()
    model.eval()
    injection = peftcore.apply(model, "polytropon", **OPTIONS)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 1)
    assert_beams_keep_the_tasks_of_their_rows(model, inputs["input_ids"], [3, 0])


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear-2d": lambda: (nn.Linear(12, 8), torch.randn(4, 12)),
    "linear-unbatched": lambda: (nn.Linear(12, 8), torch.randn(12)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), torch.randn(4, 4, 7, 6)),
    "conv2d-unbatched": lambda: (nn.Conv2d(4, 6, 3, padding=1), torch.randn(4, 5, 5)),
    "embedding": lambda: (
        nn.Embedding(20, 6, padding_idx=0),
        torch.tensor([[0, 3, 5], [1, 1, 19], [2, 0, 4], [7, 8, 9]]),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_layers_against_the_equation(kind: str) -> None:
    """The effective weight of each task, in float64, run by the layer itself: a row at a time."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    base = nn.Sequential(layer).double()
    x = x.double() if x.is_floating_point() else x
    model = deepcopy(base).eval()
    injection = peftcore.apply(model, "polytropon", target="0", **OPTIONS, splits=2, dtype="float64")
    fill(injection)
    (op,) = injection.operators.values()
    alone = "unbatched" in kind
    tasks = [2] if alone else [2, 0, 3, 1]
    with peftcore.call(model, task=2 if alone else tasks):
        ours = model(x)[None] if alone else model(x)
    for row, task in enumerate(tasks):
        w = op.logits[task].sigmoid()
        w = w / w.sum(-1, keepdim=True)
        A = torch.cat([sum(w[q, s] * op.A[q, s] for s in range(SKILLS)) for q in range(2)], 1)  # [rank, in, *kernel]
        B = torch.cat([sum(w[q, s] * op.B[q, s] for s in range(SKILLS)) for q in range(2)], 0)
        update = torch.einsum("or,r...->o...", B, A) / RANK
        update = update.T if kind == "embedding" else update
        twin = deepcopy(base)
        twin[0].weight.data += update
        twin[0].padding_idx = None
        expected = twin(x) if alone else twin(x)[row]
        assert difference(expected, base(x) if alone else base(x)[row]) > 1e-3
        torch.testing.assert_close(ours[row], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", LAYERS)
def test_own_skills_against_polytropon_by_itself(kind: str, train: bool) -> None:
    """C-Poly: a task does what an adapter of one task does that has the common skills and this task's own: outputs and
    gradients, row by row, in training with the same draws. Rows of other tasks leave no gradient in own skills."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    base = nn.Sequential(layer).double().train(train)
    x = x.double() if x.is_floating_point() else x
    model, own, alone = deepcopy(base), 2, "unbatched" in kind
    injection = peftcore.apply(model, "polytropon", target="0", **OPTIONS, own_skills=own, splits=2, dtype="float64")
    fill(injection)
    (operator,) = injection.operators.values()
    op: Any = operator
    tasks = [2] if alone else [2, 0, 3, 2]
    torch.manual_seed(1)
    with peftcore.call(model, task=2 if alone else tasks):
        ours = model(x)[None] if alone else model(x)
    direction = torch.randn_like(ours)
    gradients = torch.autograd.grad((ours * direction).sum(), [op.A, op.own_A, op.own_B, op.logits])
    torch.manual_seed(1)
    draws = torch.rand(len(tasks), 2, SKILLS + own, dtype=torch.float64)
    found = [torch.zeros_like(each) for each in gradients]
    for row, task in enumerate(tasks):
        other = deepcopy(base)
        options = {"skills": SKILLS + own, "rank": RANK, "splits": 2}
        (alike,) = peftcore.apply(other, "polytropon", target="0", **options, dtype="float64").operators.values()
        twin: Any = alike
        mine = slice(own * task, own * task + own)
        with torch.no_grad():
            twin.A.copy_(torch.cat([op.A, op.own_A[:, mine]], 1))
            twin.B.copy_(torch.cat([op.B, op.own_B[:, mine]], 1))
            twin.logits.copy_(op.logits[task])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, row=row, **kwargs: draws[row].expand(*shape))
            theirs = other(x) if alone else other(x)[row]
        torch.testing.assert_close(ours[row], theirs, rtol=1e-10, atol=1e-10)
        A, B, logits = torch.autograd.grad((theirs * direction[row]).sum(), [twin.A, twin.B, twin.logits])
        found[0] += A[:, :SKILLS]
        found[1][:, mine] += A[:, SKILLS:]
        found[2][:, mine] += B[:, SKILLS:]
        found[3][task] += logits[0]
    for gradient, expected in zip(gradients, found, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)
    assert not gradients[1][:, own : 2 * own].any()


def test_own_skills_start_as_the_others_and_are_reported(tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(6, 4)), "c_poly", target="0", tasks=["a", "b"])
    (operator,) = injection.operators.values()
    op: Any = operator
    assert op.A.shape == (1, 3, 8, 6) and op.own_A.shape == (1, 2, 8, 6) and not op.own_B.any()
    assert 0.2 < op.own_A.abs().max() <= 18**-0.5 and op.logits.shape == (2, 1, 4)
    assert sum(p.numel() for p in injection.parameters()) == (3 + 2) * 8 * (6 + 4) + 2 * 4
    with torch.no_grad():
        op.logits[0, 0, 3] = 5.0
    model = injection.model.eval()
    with peftcore.call(model, task=["a", "b", "a"]), injection.reporting():
        model(torch.randn(3, 6))
    (row,) = injection.report().routers
    w = torch.tensor([0.5, 0.5, 0.5, 1 / (1 + torch.e**-5)])
    assert row.shares == pytest.approx(((2 * w / w.sum() + 0.25) / 3).tolist(), abs=1e-3) and row.choices == 3
    with pytest.raises(ExportError, match="own_skills=0"):
        injection.save(tmp_path / "there", format="peft")


def test_logits_learn_at_a_rate_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    injection = peftcore.apply(model, "polytropon", target="0", tasks=2)
    (op,) = injection.operators.values()
    groups = injection.optimizer(torch.optim.AdamW, lr=1e-3, weight_decay=0.1).param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates == {id(op.A): (1e-3, 0.1), id(op.B): (1e-3, 0.1), id(op.logits): (0.1, 0.0)}


def test_what_is_refused() -> None:
    for layer, options, reason in (
        (nn.Linear(6, 4), {"splits": 4}, "splits=4 does not divide"),
        (nn.Conv2d(4, 4, 3, groups=2), {}, "read, not called"),
    ):
        with pytest.raises(UnsupportedSite, match=reason):
            peftcore.apply(nn.Sequential(layer), "polytropon", target="0", **options)
    injection = peftcore.apply(nn.Sequential(nn.Linear(6, 4)), "polytropon", target="0")
    with pytest.raises(NotMergeable):
        injection.merge()
