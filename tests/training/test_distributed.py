"""Two processes give the gradients of one, for methods that act in attention, in sequences and across blocks: DDP and
FSDP2 (`tests/torch_interop/test_distributed.py` has those of single weights and activations)."""

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import peftcore
from peftcore.testing.hosts import HOSTS

RANKS = 2
METHODS: dict[str, Any] = {
    "prompt_tuning": {"length": 3},
    "prefix_tuning": {"length": 3, "projection": 4},
    "llama_adapter": {"layers": 2, "length": 3},
    "parallel_adapter": {"bottleneck": 4},
    "loreft": {"rank": 2},
    "lst": {"reduction": 2},
    "adalora": {},
    "a list": ["lora", {"method": "prefix_tuning", "length": 2, "projection": None}],
}
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")


def adapted(name: str) -> tuple[nn.Module, peftcore.Injection, Tensor]:
    torch.manual_seed(0)
    model, _ = HOSTS["llama"].build()
    given = METHODS[name]
    method, options = (name, given) if isinstance(given, dict) else (given, {})
    injection = peftcore.apply(model.eval(), method, name="one", **options)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, injection, torch.randint(3, 40, (2 * RANKS, 6))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(injection: peftcore.Injection) -> list[Tensor]:
    return [whole(p.grad).clone() for p in injection.parameters() if p.grad is not None]


def check(way: str, name: str) -> None:
    model, injection, ids = adapted(name)
    model(input_ids=ids).logits.square().sum().div(RANKS).backward()
    expected = gradients(injection)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    model, injection, ids = adapted(name)
    if way == "ddp":
        runner: nn.Module = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        runner = fully_shard(model)
    for _ in range(2):  # the second step sees what the first left behind
        runner.zero_grad()
        runner(input_ids=ids.chunk(RANKS)[dist.get_rank()]).logits.square().sum().backward()
        for found, wanted in zip(gradients(injection), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def work(rank: int, port: int, way: str, failures: Any) -> None:
    """One rank: every method in one process group."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        if way != "ddp":
            init_device_mesh("cpu", (RANKS,))
        for name in METHODS:
            check(way, name)
    except BaseException as error:
        failures.put(f"{way}, {name}, rank {rank}: {type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_gradients_equal_the_single_process(way: str) -> None:
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    try:
        multiprocessing.spawn(work, args=(port, way, failures), nprocs=RANKS, join=True)
    except multiprocessing.ProcessRaisedException as error:
        pytest.fail(failures.get() if not failures.empty() else str(error))
    finally:
        failures.close()
