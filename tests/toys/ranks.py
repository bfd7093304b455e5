"""Cases that run in two processes with gloo, as few pairs of processes as may be: to start two takes seconds."""

import gc
import importlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

RANKS = 2
Cases = Mapping[Any, Callable[[], None]]


def outcomes_of(module: str) -> dict[Any, str]:
    """What was wrong with each of the `CASES` of a test module, or nothing; its `begin` starts the group of
    processes."""
    cases: Cases = importlib.import_module(module).CASES
    found: dict[Any, str] = {}
    while left := [case for case in cases if case not in found]:
        found |= _on_two_ranks(module, left)
    return found


def _on_two_ranks(module: str, cases: Sequence[Any]) -> dict[Any, str]:
    """Up to the first that fails: a rank that waits for a dead one cannot go on."""
    done = multiprocessing.get_context("spawn").SimpleQueue()
    failed = ""
    try:
        multiprocessing.spawn(_work, args=(_free_port(), module, cases, done), nprocs=RANKS, join=True)
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        failed = str(error)
    found: dict[Any, str] = {}
    while not done.empty():
        case, wrong = done.get()
        found[case] = found.get(case) or wrong
    if failed and not any(found.values()):
        found[next(case for case in cases if case not in found)] = failed
    return found


def _work(rank: int, port: int, module: str, cases: Sequence[Any], done: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    found = importlib.import_module(module)
    found.begin()
    try:
        for case in cases:
            found.CASES[case]()
            dist.barrier()
            if rank == 0:
                done.put((case, ""))
    except BaseException as error:
        done.put((case, f"rank {rank}: {type(error).__name__}: {error}"))
        raise
    finally:
        gc.collect()  # what holds the group has to be gone: see process_groups
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def shared_folder(make: Callable[[], str]) -> str:
    """The name of a folder that the first process makes, in both."""
    names = [make() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names)
    return names[0]
