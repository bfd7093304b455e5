"""A fleet in two processes, each with its half of every batch: DDP and FSDP2 on gloo."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fleet_toys import ADAMW, SGD, alone, applied, expect_same, llama, next_token, texts
from process_groups import process_group
from torch import multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peftcore
from peftcore.layers.fsdp import gathered
from peftcore.layers.pieces import is_cut
from peftcore.training import Fleet

RANKS, STEPS = 2, 20
MEMBERS: list[tuple[str, str, dict[str, Any]]] = [
    ("a", "lora", {"rank": 2}),
    ("b", "lora", {"rank": 4}),
    ("c", "dora", {}),
    ("d", "houlsby_adapter", {"bottleneck": 4}),
]
OPTIMIZERS: dict[str, tuple[Any, float, float]] = {
    "sgd": (torch.optim.SGD, 0.1, SGD),
    "adamw": (torch.optim.AdamW, 1e-2, ADAMW),
}
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")]


def data(seed: int, rank: int | None = None) -> list[dict[str, torch.Tensor]]:
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return [{key: each[rows] for key, each in batch.items()} for batch in texts(seed, rows=4)]


def wrapped(way: str, model: Any) -> nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "ddp, any time":
        return DistributedDataParallel(model, find_unused_parameters=True)
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def begun(way: str, kind: str, folder: Path, resume: bool = False, steps: int = STEPS) -> tuple[Fleet, nn.Module]:
    cls, rate, _ = OPTIMIZERS[kind]
    model = llama()
    late = 1 if way == "ddp, any time" else 0  # it comes when the model is wrapped
    made = [(name, method, ord(name), options) for name, method, options in MEMBERS]
    held = [applied(model, method, name, seed, **options) for name, method, seed, options in made[late:]]
    whole = wrapped(way, model)
    held = [applied(model, method, name, seed, **options) for name, method, seed, options in made[:late]] + held
    fleet = Fleet(whole)
    for number, injection in enumerate(held):
        fleet.join(
            injection,
            data(ord(injection.name), dist.get_rank()),
            loss=next_token,
            optimizer=injection.optimizer(cls, lr=rate),
            steps=steps - 3 * number if way != "ddp" else steps,
            clip=0.5,
            folder=folder / injection.name,
            save_every=4,
            resume=resume,
        )
    return fleet, model


def one_of_two(rank: int, work: Callable[..., None], *given: str) -> None:
    """Do the work in one of two processes; they meet in a file, so nobody else can have taken a port."""
    torch.set_num_threads(1)
    with process_group(init_method=f"file://{given[-1]}/met", rank=rank, world_size=RANKS):
        work(*given)


def run(way: str, kind: str, folder: str) -> None:
    cls, rate, tolerance = OPTIMIZERS[kind]
    fleet, model = begun(way, kind, Path(folder))
    for _ in range(10):  # killed after the checkpoint of step 8
        fleet.step()
    if way == "fsdp2":
        assert all(is_cut(each) for member in fleet for each in member.parameters())
    del fleet
    fleet, model = begun(way, kind, Path(folder), resume=True)
    assert {member.step for member in fleet} == {8}
    fleet.run()
    for number, member in enumerate(fleet):
        name, method, options = MEMBERS[number]
        assert member.step == (STEPS if way == "ddp" else STEPS - 3 * number)
        with gathered(model, member.injection.parameters):
            single = llama()
            injection = applied(single, method, name, ord(name), **options)
            optimizer = injection.optimizer(cls, lr=rate)
            wanted = alone(single, injection, data(ord(name)), optimizer, clip=0.5, steps=member.step)
            expect_same(member, injection, wanted, tolerance)
        saved = peftcore.load(llama(), Path(folder) / name / f"step-{member.step:08d}")
        for key, value in injection.state_dict().items():
            torch.testing.assert_close(saved.state_dict()[key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("way", ["ddp", "ddp, any time", "fsdp2"])
def test_two_processes_take_the_steps_of_one(way: str, kind: str) -> None:
    """All members, killed once and gone on with; in two of the ways they end one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(one_of_two, (run, way, kind, folder), nprocs=RANKS)


def test_draws_differ_between_processes() -> None:
    """The same seed in all of them, as for the order of data, and other rows are dropped all the same."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(one_of_two, (drop, folder), nprocs=RANKS)


def drop(folder: str) -> None:
    model = llama()
    injection = applied(model, "lora", "a", dropout=0.5)
    fleet = Fleet(DistributedDataParallel(model))
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    own: list[float] = []

    def noted(output: Any, batch: Any) -> torch.Tensor:
        own.append(next_token(output, batch).item())
        return next_token(output, batch)

    fleet.join(injection, texts(1), loss=noted, optimizer=optimizer, steps=1, seed=3)
    fleet.run()
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, own)
    assert fleet.members["a"].losses == pytest.approx([sum(each[0] for each in found) / RANKS])
    assert found[0] != found[1]
