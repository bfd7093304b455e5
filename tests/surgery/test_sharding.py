"""What a plan says of each process is what two processes hold after FSDP2 sharded the adapted model and took a step."""

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from core_toys import transformer
from process_groups import process_group
from torch import Tensor, multiprocessing, nn

import peftcore
from peftcore.errors import ConfigError, UnsupportedHost
from peftcore.testing.hosts import HOSTS

PROCESSES = 2
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3},  # pieces of different sizes
    "dora": {},
    "ia3": {},
    "houlsby_adapter": {},
    "vera": {},  # buffers, shared by sites
    "ln_tuning": {},
    "prompt_tuning": {"length": 3},  # in no block
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return HOSTS["llama"].build()[0]


def test_pieces_by_hand() -> None:
    """Seven rows over three processes: three, three, one; two rows over three: one, one, none."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2, bias=False))
    plan = peftcore.plan(model, "lora", rank=2, target="1", shards=3)
    assert [each.weights for each in plan.shards] == [
        4 * (3 * 5 + 3 + 7),
        4 * (3 * 5 + 3 + 7),
        4 * (5 + 1),
    ]
    assert [each.gradients for each in plan.shards] == [4 * (7 + 2), 4 * (7 + 2), 0]
    assert [each.optimizer for each in plan.shards] == [8 * (7 + 2), 8 * (7 + 2), 0]
    assert {each.gathered for each in plan.shards} == {4 * (9 * 5 + 9 + 3 * 7 + 3 * 7 + 3 * 2)}  # no blocks: all of it
    assert "process 2: 24 bytes of weights" in str(plan)


@pytest.mark.parametrize("method", METHODS)
def test_one_process_holds_all_of_it(method: str) -> None:
    model = llama()
    [alone] = peftcore.plan(model, method, shards=1, **METHODS[method]).shards
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    plan = peftcore.plan(model, method, **METHODS[method])
    assert (alone.weights, alone.adapter, alone.gradients) == (weights, plan.resident, 4 * plan.trainable)
    assert plan.shards == ()


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "two"])
def test_what_is_no_number_of_processes(number: Any) -> None:
    with pytest.raises(ConfigError, match="shards= must be a number of processes"):
        peftcore.plan(transformer(), "lora", shards=number)


def test_what_cannot_be_cut_is_refused() -> None:
    model = transformer()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(UnsupportedHost, match="is a scalar"):
        peftcore.plan(model, "lora", shards=2)


# ---------------------------------------------------------------- two processes

Measured = dict[str, int]


def local(tensor: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensors: Any) -> int:
    return sum(local(each).nbytes for each in tensors)


def measured(method: str) -> Measured:
    """What this process holds after one step; `gathered` is the most that was whole as some block ran, forward or
    backward."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = llama()
    own = {id(each) for each in (*model.parameters(), *model.buffers())}
    names = {name for name, each in (*model.named_parameters(), *model.named_buffers()) if id(each) in own}
    injection = peftcore.apply(model, method, **METHODS[method])
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    groups = [
        group
        for each in model.modules()
        if isinstance(each, FSDPModule)
        for group in each._get_fsdp_state()._fsdp_param_groups
    ]
    whole = [0]

    def look(*_: Any) -> None:
        held = [each._unsharded_param for g in groups for each in g.fsdp_params if hasattr(each, "_unsharded_param")]
        whole.append(sum(each.untyped_storage().nbytes() for each in held))

    for block in model.model.layers:
        for module in block.modules():
            module.register_forward_hook(look)
            module.register_full_backward_hook(look)
    model(input_ids=torch.randint(3, 40, (2, 6))).logits.square().sum().backward()
    optimizer.step()
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    base = [each for name, each in tensors.items() if name in names]
    states = [each[key] for each in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    injection.check()
    return {
        "weights": size(base),
        "adapter": size(tensors.values()) - size(base),
        "gradients": size(each.grad for each in model.parameters() if each.grad is not None),
        "optimizer": size(states),
        "gathered": max(whole),
    }


def work(rank: int, port: int, done: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with process_group(rank=rank, world_size=PROCESSES):
        for method in METHODS:
            done.put((method, rank, measured(method)))


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, int], Measured]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    done = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(work, args=(port, done), nprocs=PROCESSES, join=True)
    return {(method, rank): each for method, rank, each in (done.get() for _ in range(PROCESSES * len(METHODS)))}


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_hold_what_is_planned(method: str, found: dict[tuple[str, int], Measured]) -> None:
    shards = peftcore.plan(llama(), method, shards=PROCESSES, **METHODS[method]).shards
    for rank, shard in enumerate(shards):
        assert found[method, rank] == vars(shard), (method, rank)
