"""`Fleet`: each member's trajectory is the one that it takes alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet_toys import ADAMW, SGD, STEPS, alone, applied, expect_same, llama, next_token, texts
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader

import peftcore
from peftcore.errors import CheckpointError, RouteError, TrainingError, UnknownInjection
from peftcore.training import Fleet, Member

OPTIMIZERS = {"sgd": (torch.optim.SGD, SGD), "adamw": (torch.optim.AdamW, ADAMW)}
RATES = {"sgd": (0.3, 1.0), "adamw": (1e-2, 3e-2)}


class Case:
    """One member, and the same adapter alone: made twice from the same description."""

    def __init__(self, name: str, method: str = "lora", rate: float = 1e-2, kind: str = "adamw", **how: Any) -> None:
        self.name, self.method, self.rate, (self.cls, self.tolerance) = name, method, rate, OPTIMIZERS[kind]
        self.seed = how.pop("seed", sum(map(ord, name)))
        self.clip, self.accumulate = how.pop("clip", None), how.pop("accumulate", 1)
        self.scheduled, self.steps = how.pop("scheduled", None), how.pop("steps", STEPS)
        self.options = how

    def made(self, model: nn.Module) -> tuple[peftcore.Injection, Any, Any]:
        injection = applied(model, self.method, self.name, self.seed, **self.options)
        optimizer = injection.optimizer(self.cls, lr=self.rate, total_steps=self.steps)
        return injection, optimizer, self.scheduled(optimizer) if self.scheduled else None

    def join(self, fleet: Fleet, model: nn.Module, **more: Any) -> Member:
        injection, optimizer, schedule = self.made(model)
        options: dict[str, Any] = {"loss": next_token, "steps": self.steps, "clip": self.clip, **more}
        return fleet.join(
            injection, texts(self.seed), optimizer=optimizer, schedule=schedule, accumulate=self.accumulate, **options
        )

    def expect(self, member: Member, model: Any = None, steps: int | None = None) -> None:
        """Compare with the loop."""
        model = llama() if model is None else model
        injection, optimizer, schedule = self.made(model)
        before = {key: each.clone() for key, each in injection.state_dict().items()}
        count = self.steps if steps is None else steps
        losses = alone(model, injection, texts(self.seed), optimizer, schedule, self.clip, self.accumulate, count)
        assert any(not torch.equal(each, before[key]) for key, each in injection.state_dict().items())
        expect_same(member, injection, losses, self.tolerance)


def trained(*cases: Case, model: Any = None, **options: Any) -> Fleet:
    """Train all of them together, and compare each."""
    model = llama() if model is None else model
    fleet = Fleet(model, **options)
    members = [case.join(fleet, model) for case in cases]
    assert [each.name for each in fleet.run()] == [case.name for case in cases]
    for case, member in zip(cases, members, strict=True):
        assert member.done and not member.failed
        case.expect(member)
    return fleet


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_ranks_and_rates(kind: str) -> None:
    small, large = RATES[kind]
    fleet = trained(Case("a", rate=small, kind=kind, rank=2), Case("b", rate=large, kind=kind, rank=5))
    assert fleet.forwards == STEPS and fleet.alone == 2 * STEPS


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_clipping_schedules_and_accumulation(kind: str) -> None:
    small, large = RATES[kind]
    fleet = trained(
        Case("a", rate=large, kind=kind, clip=0.05, scheduled=lambda it: CosineAnnealingLR(it, STEPS)),
        Case("b", rate=small, kind=kind, accumulate=3, scheduled=lambda it: LambdaLR(it, lambda n: 1 / (n + 1))),
        Case("c", rate=small, kind=kind, accumulate=2, clip=0.1),
        Case("d", rate=small, kind=kind),
    )
    assert fleet.forwards == 3 * STEPS


OTHERS = ["dora", "vera", "ia3", "houlsby_adapter", "bitfit", "ln_tuning", "prefix_tuning", "loreft", "oft"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_methods(kind: str) -> None:
    """Different ones in one batch, some of them around modules, inside attention, in front of the sequence."""
    rate = {"sgd": 0.1, "adamw": 1e-2}[kind]
    options: dict[str, Any] = {
        "houlsby_adapter": {"bottleneck": 4},
        "vera": {"rank": 8},
        "oft": {"block_size": 4},
        "bitfit": {"add_missing_bias": True},
    }
    trained(*[Case(chr(97 + n), each, rate, kind, **options.get(each, {})) for n, each in enumerate(OTHERS)])


def draws(case: Case) -> bool:
    """Whether the plain loop draws random numbers."""
    model = llama()
    injection, optimizer, _ = case.made(model)
    before = torch.get_rng_state()
    alone(model, injection, texts(case.seed), optimizer, steps=1)
    return not torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_every_method_that_can_be_routed() -> None:
    """Each beside another one, with its default options: it takes its own steps, or says that it cannot."""
    refused, wrong, right = {}, {}, []
    for info in peftcore.methods():
        if not info.tags.per_row or info.tags.needs_data:
            continue
        model = llama()
        fleet = Fleet(model)
        case = Case(info.name, info.name, 1e-3, steps=3)
        try:
            member = case.join(fleet, model)
            Case("other", "ia3", 1e-2, steps=3).join(fleet, model)
            fleet.run()
        except peftcore.errors.PeftcoreError as error:
            refused[info.name] = error
            continue
        try:
            if draws(case):  # alone is in a fleet of one
                lonely = Fleet(model := llama())
                single = case.join(lonely, model)
                lonely.run()
                expect_same(member, single.injection, single.losses, case.tolerance)
            else:
                case.expect(member)
        except AssertionError as error:
            wrong[info.name] = error
        right.append(info.name)
    assert not wrong
    assert len(right) >= 40, refused


def test_methods_with_rules_schedules_and_losses_of_their_own() -> None:
    """adalora changes with the steps and adds a loss, lora_plus has two rates, galore a rule for gradients."""
    trained(
        Case("a", "adalora", 1e-2, warmup=2, final=4),
        Case("b", "lora_plus", 1e-3),
        Case("c", "hra", 1e-2),
        Case("d", clip=0.1),
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    cases = [Case("a", kind="sgd", rate=0.3), Case("b", "dora", kind="sgd", rate=0.3), Case("c", "ia3", 0.1, "sgd")]
    trained(*cases, model=model)


def dropping(name: str, seed: int, method: str = "lora") -> tuple[Case, int]:
    return Case(name, method, dropout=0.4), seed


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_members_drop_what_they_drop_alone(reentrant: bool | None) -> None:
    """Alone: in a fleet of one. With the same seed two of them drop the same, with others not."""
    cases = [dropping("a", 1), dropping("b", 2), dropping("c", 1, "dora"), dropping("d", 5, "parallel_adapter")]

    def ready() -> Any:
        model = llama()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        return model

    model = ready()
    fleet = Fleet(model)
    members = [case.join(fleet, model, seed=seed) for case, seed in cases]
    state = torch.get_rng_state()
    fleet.run()
    assert torch.equal(torch.get_rng_state(), state)
    for (case, seed), member in zip(cases, members, strict=True):
        for own, same in ((seed, True), (seed + 10, False)):
            other = ready()
            lonely = Fleet(other)
            single = case.join(lonely, other, seed=own)
            lonely.run()
            gap = max(abs(a - b) for a, b in zip(single.losses, member.losses, strict=True))
            assert (gap <= ADAMW) is same, (case.method, gap)


def test_a_plain_loop_may_draw_the_same() -> None:
    """The seam is `peftcore.route(model, names, seeds=...)`."""
    model = llama()
    a, b = applied(model, "lora", "a", dropout=0.5), applied(model, "lora", "b", dropout=0.5)
    (batch,) = texts(3, count=1, rows=4)
    inputs = {"input_ids": batch["input_ids"]}
    with peftcore.route(model, ["a", "a", "b", "b"], seeds={"a": 3, "b": 9}):
        both = model(**inputs).logits
    for name, rows, seed in ((a.name, slice(2), 3), (b.name, slice(2, 4), 9)):
        with peftcore.route(model, [name, name], seeds={name: seed}):
            single = model(input_ids=batch["input_ids"][rows]).logits
        with peftcore.route(model, [name, name], seeds={name: seed + 1}):
            other = model(input_ids=batch["input_ids"][rows]).logits
        torch.testing.assert_close(both[rows], single, rtol=1e-12, atol=1e-12)
        assert (other - single).abs().max() > 1e-3


def test_members_join_and_leave_between_steps() -> None:
    model = llama()
    fleet = Fleet(model)
    cases = {name: Case(name, steps=12, rank=2) for name in "abc"}
    members = {"a": cases["a"].join(fleet, model)}
    for _ in range(4):
        fleet.step()
    members["b"] = cases["b"].join(fleet, model)
    for _ in range(3):
        fleet.step()
    assert fleet.leave("a") is members["a"] and members["a"].ended == "it left"
    assert "a" in peftcore.injections(model)
    members["c"] = cases["c"].join(fleet, model)
    fleet.run()
    assert [members[name].step for name in "abc"] == [7, 12, 12]
    for name, member in members.items():
        cases[name].expect(member, steps=member.step)
    with pytest.raises(UnknownInjection, match="no member 'a'"):
        fleet.leave("a")


def test_a_member_ends_early_and_others_go_on() -> None:
    model = llama()
    fleet = Fleet(model)
    cases = [Case("a", steps=12), Case("b", steps=12)]
    first = cases[0].join(fleet, model, stop=lambda member: len(member.losses) == 5)
    second = cases[1].join(fleet, model)
    fleet.run()
    assert (first.step, first.ended, second.step) == (5, "stopped early", 12)
    cases[0].expect(first, steps=5)
    cases[1].expect(second)


def test_a_loss_that_is_no_number_ends_one_member_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    fleet = Fleet(model)
    case = Case("a", steps=8)
    good = case.join(fleet, model)
    calls = []

    def breaks(output: Any, batch: Any) -> Tensor:
        calls.append(1)
        return next_token(output, batch) * (math.nan if len(calls) > 3 else 1.0)

    other = Case("b", steps=8)
    bad = other.join(fleet, model, loss=breaks)
    fleet.run()
    assert bad.failed and "nan in step 4" in bad.ended and bad.step == 3 and "'b'" in caplog.text
    case.expect(good)
    other.expect(bad, steps=3)


def test_losses_of_operators_are_those_of_their_own_member() -> None:
    """Beside one without, and beside another one, over several batches a step."""
    trained(
        Case("a"),
        Case("b", "loramoe", balance=0.5, dropout=0.0, accumulate=4),
        Case("c", "loramoe", 3e-3, balance=0.1, dropout=0.0, accumulate=2),
        Case("d", "pvera", kl=0.5, sample="never"),
    )


def test_an_own_loss_that_is_no_number_ends_its_member_alone() -> None:
    model = llama()
    fleet = Fleet(model)
    cases = [Case("a", accumulate=2), Case("b", "loramoe", balance=0.5, dropout=0.0, accumulate=2)]
    good, bad = (case.join(fleet, model) for case in cases)
    held = [each.detach().clone() for each in bad.parameters()]
    (operator, *_) = bad.injection.operators.values()

    def breaks(gates: Tensor) -> Tensor:
        return type(operator).imbalance(operator, gates) * (math.nan if bad.step == 3 else 1.0)

    object.__setattr__(operator, "imbalance", breaks)
    while not bad.done:
        held = [each.detach().clone() for each in bad.parameters()]
        fleet.step()
    assert bad.failed and "nan in step 4" in bad.ended and not good.failed
    assert all(torch.equal(each, before) for each, before in zip(bad.parameters(), held, strict=True))
    fleet.run()
    cases[0].expect(good)
    cases[1].expect(bad, steps=3)


def test_a_loss_in_a_tuple_over_all_rows_is_refused() -> None:
    model = llama()
    fleet = Fleet(model, targets=())
    injection, optimizer, _ = Case("a").made(model)
    batches = [{**each, "return_dict": False} for each in texts(1)]
    fleet.join(injection, batches, optimizer=optimizer, steps=1, loss=lambda output, batch: output[0])
    with pytest.raises(TrainingError, match="loss over the rows of all members"):
        fleet.step()


def test_other_lengths_are_filled_up_as_the_user_says() -> None:
    model = llama()
    fleet = Fleet(model, pad={"input_ids": 0, "attention_mask": 0, "labels": -100})
    members = {}
    for name, length in (("a", 4), ("b", 7)):
        injection = applied(model, "lora", name, length)
        optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-2)
        members[name] = fleet.join(
            injection, texts(length, length=length), loss=next_token, optimizer=optimizer, steps=6
        )
    fleet.run()
    for name, length in (("a", 4), ("b", 7)):
        other = llama()
        injection = applied(other, "lora", name, length)
        optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-2)
        losses = alone(other, injection, texts(length, length=length), optimizer, steps=6)
        expect_same(members[name], injection, losses, ADAMW)


def test_a_step_that_fails_leaves_everything_and_is_run_again() -> None:
    model = llama()
    fleet = Fleet(model)
    case = Case("a", steps=6)
    member = case.join(fleet, model)
    other = Case("b", steps=6).join(fleet, model, stop=None)
    fleet.step()
    held = other.feed._data
    other.feed._data, other.feed._iterator = texts(9, length=8), None
    before = {key: each.clone() for key, each in member.injection.state_dict().items()}
    with pytest.raises(TrainingError, match=r"'a': .*'b': "):
        fleet.step()
    assert all(torch.equal(each, before[key]) for key, each in member.injection.state_dict().items())
    assert all(each.grad is None for each in model.parameters()) and (member.step, other.step) == (1, 1)
    other.feed._data, other.feed._iterator, other._window = held, None, []
    fleet.run()
    case.expect(member)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_the_models_own_by_default(accumulate: int) -> None:
    """With tokens that do not count: a mean over those of the member, over all batches of a step."""
    model = llama()
    fleet = Fleet(model)
    data = {name: texts(seed) for name, seed in (("a", 1), ("b", 2))}
    for batches in data.values():
        for n, each in enumerate(batches):
            each["labels"][0, : 2 + n % 3] = -100
    members = {}
    for name, batches in data.items():
        injection = applied(model, "lora", name)
        optimizer = injection.optimizer(torch.optim.SGD, lr=0.3)
        members[name] = fleet.join(injection, batches, optimizer=optimizer, accumulate=accumulate, steps=6)
    fleet.run()
    for name, batches in data.items():
        other = llama()
        injection = applied(other, "lora", name)
        optimizer = injection.optimizer(torch.optim.SGD, lr=0.3)
        losses, tokens = [], 0
        for step in range(6):
            window = [batches[(step * accumulate + n) % 3] for n in range(accumulate)]
            items = sum(int(each["labels"][:, 1:].ne(-100).sum()) for each in window)
            optimizer.zero_grad()
            found = [other(**each, num_items_in_batch=torch.tensor(items)).loss for each in window]
            sum(found).backward()
            optimizer.step()
            losses.append(sum(each.item() for each in found))
            tokens += items
        expect_same(members[name], injection, losses, 1e-6)  # transformers computes it in float32
        assert members[name].tokens == tokens


@pytest.mark.parametrize("every", [5, 6])
def test_a_member_goes_on_from_a_checkpoint_exactly(tmp_path: Path, every: int) -> None:
    def data() -> DataLoader[Any]:
        (rows,) = texts(4, count=1, rows=12)
        table = [{key: each[n] for key, each in rows.items()} for n in range(12)]
        return DataLoader(table, batch_size=2, shuffle=True)  # type: ignore[arg-type]

    def begun(out: Path, resume: bool = False) -> Fleet:
        model = llama()
        fleet = Fleet(model)
        torch.manual_seed(123 if resume else 9)  # nothing may depend on it
        for name, method, seed in (("a", "lora", 1), ("b", "adalora", 2), ("c", "vera", 3)):
            options: dict[str, Any] = {"lora": {"dropout": 0.3}, "adalora": {"warmup": 2, "final": 4}}
            case = Case(name, method, scheduled=lambda it: CosineAnnealingLR(it, STEPS), **options.get(method, {}))
            injection, optimizer, schedule = case.made(model)
            fleet.join(
                injection,
                data(),
                loss=next_token,
                optimizer=optimizer,
                schedule=schedule,
                steps=STEPS,
                seed=seed,
                accumulate=seed,
                folder=out / name,
                save_every=every,
                resume=resume,
            )
        return fleet

    whole = begun(tmp_path / "whole")
    whole.run()
    killed = begun(tmp_path / "killed")
    for _ in range(13):  # the last checkpoint is of step 10 or 12
        killed.step()
    again = begun(tmp_path / "killed", resume=True)
    assert {each.step for each in again} == {13 // every * every}
    again.run()
    for one, two in zip(whole, again, strict=True):
        assert one.losses == two.losses and one.tokens == two.tokens and two.step == STEPS
        for key, value in one.injection.state_dict().items():
            torch.testing.assert_close(two.injection.state_dict()[key], value, rtol=0, atol=0)
        saved = peftcore.load(llama(), tmp_path / "killed" / one.name / f"step-{STEPS:08d}")
        torch.testing.assert_close(saved.state_dict(), one.injection.state_dict(), rtol=0, atol=0)
    with pytest.raises(TrainingError, match="earlier training"):
        begun(tmp_path / "killed")


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    def begun(**more: Any) -> Fleet:
        model = llama()
        fleet = Fleet(model)
        case = Case("a", steps=4, **more.pop("options", {}))
        injection, optimizer, _ = case.made(model)
        fleet.join(injection, texts(1), loss=next_token, optimizer=optimizer, folder=tmp_path, steps=4, **more)
        return fleet

    fleet = begun()
    fleet.step()
    fleet.save()
    for wrong, options in (
        ("seed", {"seed": 3}),
        ("another adapter", {"options": {"rank": 3}}),
        ("method was 'lora' and is 'ia3'", {"options": {"method": "ia3"}}),
        ("alpha was 8.0 and is 99.0", {"options": {"alpha": 99}}),
        ("optimizer was", {"options": {"kind": "sgd"}}),
    ):
        with pytest.raises(CheckpointError, match=wrong):
            begun(resume=True, **options)
    assert begun(resume=True).members["a"].step == 1
    (place,) = tmp_path.glob("step-*")
    (place / "training.json").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        begun(resume=True)


def test_what_cannot_train_in_a_fleet_is_refused_and_nothing_changes() -> None:
    model = llama()
    fleet = Fleet(model)
    lora = applied(model, "lora", "a")

    def join(injection: Any = lora, **options: Any) -> Member:
        given = {"optimizer": torch.optim.SGD(list(injection.parameters()), lr=0.1), "loss": next_token}
        return fleet.join(injection, texts(1), **{**given, **options})

    lora.trainable(False)
    with pytest.raises(TrainingError, match="frozen"):
        join()
    lora.trainable(True)
    with pytest.raises(TrainingError, match="optimizer of 'a'"):
        join(optimizer=torch.optim.SGD([next(lora.parameters())], lr=0.1))
    lora.merge()
    with pytest.raises(TrainingError, match="merged"):
        join()
    lora.unmerge()
    model.lm_head.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"lm_head.*freeze"):
        join()
    model.lm_head.requires_grad_(False)
    for options, text in (({"clip": 0.0}, "clip"), ({"accumulate": 0}, "accumulate"), ({"save_every": 2}, "folder")):
        with pytest.raises(TrainingError, match=text):
            join(**options)
    other = applied(llama(), "lora", "a")
    with pytest.raises(TrainingError, match="another model"):
        join(other)
    with pytest.raises(UnknownInjection):
        fleet.join("nobody", texts(1), optimizer=torch.optim.SGD(lora.parameters(), lr=0.1))
    assert not fleet.members
    join()
    with pytest.raises(TrainingError, match="is already in the fleet"):
        join()


class Counted(nn.Module):
    """A host that makes statistics of batches, and a loss where it is given targets."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.down(self.norm(self.up(x)))
        return {"logits": y, "loss": None if labels is None else nn.functional.cross_entropy(y, labels)}


def test_statistics_and_losses_over_all_rows_are_refused() -> None:
    model = Counted().train()
    injection = peftcore.apply(model, "lora", target=["up", "down"], rank=1)
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.1)
    data = [{"x": torch.randn(3, 4), "labels": torch.tensor([0, 1, 0])}]
    with pytest.raises(TrainingError, match=r"the loss of a .* is not known"):
        Fleet(model).join(injection, data, optimizer=optimizer)

    def loss(output: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output["logits"], batch["labels"])

    fleet = Fleet(model)
    fleet.join(injection, data, optimizer=optimizer, loss=loss)
    with pytest.raises(TrainingError, match="norm computes statistics"):
        fleet.step()
    model.norm.eval()
    assert fleet.step() and not fleet.step()
    fleet = Fleet(model, targets=())
    fleet.join(injection, data, optimizer=optimizer, loss=loss)
    with pytest.raises(TrainingError, match="over the rows of all members"):
        fleet.step()


def test_methods_that_act_on_the_whole_batch_are_refused() -> None:
    for name in [each.name for each in peftcore.methods() if not each.tags.per_row]:
        model = llama()
        try:
            injection = peftcore.apply(model, name)
        except peftcore.errors.PeftcoreError:
            continue
        with pytest.raises(RouteError, match=r"cannot train in a fleet .*Train it alone"):
            Fleet(model).join(injection, texts(1), optimizer=torch.optim.SGD(injection.parameters(), lr=0.1))
        return
    pytest.fail("no method was refused")
