"""Two processes give the gradients of one: DDP and FSDP2, sharded before or after the graft."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from interop_hosts import Encoder, adapt, encoder, gradients, inputs
from ranks import RANKS, outcomes_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import peftcore
from peftcore.testing.hosts import HOSTS

METHODS = ("lora", "dora", "oft", "houlsby_adapter", "bitfit")
TOLERANCE = 1e-5
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
]

Gradients = dict[str, Tensor]


def reference(method: str) -> tuple[Gradients, list[str], Tensor]:
    """Gradients, keys and output of one process that sees the whole batch."""
    model = encoder()
    injection = adapt(model, method)
    output = model(inputs())
    output.square().sum().div(RANKS).backward()  # what the mean over ranks of each rank's sum is
    return gradients(injection), list(model.state_dict()), output.detach()


def mine(x: Tensor) -> Tensor:
    """This rank's half of the batch."""
    return x.chunk(RANKS)[dist.get_rank()]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model: Encoder, **options: Any) -> Encoder:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fill(injection: peftcore.Injection) -> None:
    """The same values as `adapt` gives, also where the tensors are shards."""
    source = adapt(encoder(), injection.name)
    values = dict(source.modules())
    with torch.no_grad():
        for path, module in injection.modules():
            for name, parameter in module.named_parameters():
                value = values[path].get_parameter(name).detach()
                sharded = isinstance(parameter, DTensor)
                parameter.copy_(
                    distribute_tensor(value, parameter.device_mesh, parameter.placements) if sharded else value
                )


def ddp(method: str) -> tuple[nn.Module, nn.Module, peftcore.Injection]:
    model = encoder()
    injection = adapt(model, method)
    return DistributedDataParallel(model), model, injection


def sharded_after(method: str) -> tuple[nn.Module, nn.Module, peftcore.Injection]:
    model = encoder()
    injection = adapt(model, method)
    return shard(model), model, injection


def sharded_before(method: str) -> tuple[nn.Module, nn.Module, peftcore.Injection]:
    model = shard(encoder())
    injection = peftcore.apply(model, method, seed=0)
    fill(injection)
    return model, model, injection


WAYS: dict[str, Callable[[str], tuple[nn.Module, nn.Module, peftcore.Injection]]] = {
    "ddp": ddp,
    "sharded after apply": sharded_after,
    "sharded before apply": sharded_before,
}


def check(way: str, method: str) -> None:
    """One step on two ranks against one process, twice: the second step sees what the first left behind."""
    expected, keys, output = reference(method)
    runner, model, injection = WAYS[way](method)
    assert [key.removeprefix("module.") for key in runner.state_dict()] == keys
    for _ in range(2):
        got = runner(mine(inputs()))
        torch.testing.assert_close(got.detach(), mine(output), rtol=TOLERANCE, atol=TOLERANCE)
        got.square().sum().backward()
        if (
            way == "sharded before apply"
        ):  # operators that nobody shards are the user's to reduce, as any late parameter
            reduce_what_is_not_sharded(injection)
        found = {name: whole(gradient) for name, gradient in gradients(injection).items()}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert not any(p.grad is not None for n, p in model.named_parameters() if "peft" not in n)
    injection.check()
    with injection.disabled():
        bare = runner(mine(inputs()))
    assert not torch.allclose(bare, got, atol=1e-3)
    if way == "sharded after apply":
        whole_state = {name: whole(value) for name, value in injection.state_dict().items()}
        single = adapt(encoder(), method).state_dict()
        assert whole_state.keys() == single.keys()
        assert all(torch.equal(whole_state[name], single[name]) for name in single)
        check_saved(method, injection)
        check_nothing_is_kept(runner, injection)


def check_saved(method: str, injection: peftcore.Injection) -> None:
    """The file is that of one process, to the byte, and the first process writes it."""
    with tempfile.TemporaryDirectory() as folder:  # each process has its own
        injection.save(Path(folder, "cut"))
        assert Path(folder, "cut").exists() == (dist.get_rank() == 0)
        if dist.get_rank() == 0:
            adapt(encoder(), method).save(Path(folder, "single"))
            for name in ("adapter.safetensors", "adapter.json"):
                assert Path(folder, "cut", name).read_bytes() == Path(folder, "single", name).read_bytes(), name


@torch.no_grad()
def check_nothing_is_kept(runner: nn.Module, injection: peftcore.Injection) -> None:
    """Effective weights are whole, and all of them together are what no process is to hold."""
    runner.eval()
    runner(mine(inputs()))
    assert not any(slot.cache for slot in injection.state.slots)


def reduce_what_is_not_sharded(injection: peftcore.Injection) -> None:
    for parameter in injection.parameters():
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(RANKS)


def check_bfloat16(method: str) -> None:
    """What FSDP2 gathers, operators too, is cast to bfloat16, and gradients are reduced in float32: near those of one
    process in float32, and an evaluation between two steps leaves nothing behind."""
    expected, _, output = reference(method)
    model = encoder()
    injection = adapt(model, method)
    runner = shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    for _ in range(2):
        got = runner(mine(inputs()))
        assert got.dtype == torch.bfloat16
        assert off(got.detach(), mine(output)) < 0.01
        got.float().square().sum().backward()
        found = {name: whole(gradient) for name, gradient in gradients(injection).items()}
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        for name, gradient in expected.items():
            assert off(found[name], gradient) < 0.03, name
        with torch.no_grad():
            assert off(runner.eval()(mine(inputs())), mine(output)) < 0.01


def off(got: Tensor, wanted: Tensor) -> float:
    """The norm of the error over that of what is right."""
    return float((got.float() - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------- methods of attention, sequences and whole blocks

LLAMA_METHODS: dict[str, Any] = {
    "prompt_tuning": {"length": 3},
    "prefix_tuning": {"length": 3, "projection": 4},
    "llama_adapter": {"layers": 2, "length": 3},
    "parallel_adapter": {"bottleneck": 4},
    "loreft": {"rank": 2},
    "lst": {"reduction": 2},
    "adalora": {},
    "a list": ["lora", {"method": "prefix_tuning", "length": 2, "projection": None}],
}


def llama(name: str) -> tuple[nn.Module, peftcore.Injection, Tensor]:
    torch.manual_seed(0)
    model, _ = HOSTS["llama"].build()
    given = LLAMA_METHODS[name]
    method, options = (name, given) if isinstance(given, dict) else (given, {})
    injection = peftcore.apply(model.eval(), method, name="one", **options)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, injection, torch.randint(3, 40, (2 * RANKS, 6))


def check_llama(way: str, name: str) -> None:
    model, injection, ids = llama(name)
    model(input_ids=ids).logits.square().sum().div(RANKS).backward()
    expected = [p.grad.clone() for p in injection.parameters() if p.grad is not None]
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    model, injection, ids = llama(name)
    if way == "ddp":
        runner: nn.Module = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        runner = fully_shard(model)
    for _ in range(2):  # the second step sees what the first left behind
        runner.zero_grad()
        runner(input_ids=mine(ids)).logits.square().sum().backward()
        found = [whole(p.grad) for p in injection.parameters() if p.grad is not None]
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- losses of methods, which the output does not have


def check_own_losses(way: str) -> None:
    """Taken in each process, they count once in the mean over processes."""
    model, injection, ids = llama("adalora")
    model.train()
    own = injection.method.aux_loss(injection)
    assert own is not None
    (model(input_ids=ids).logits.square().mean() + own).backward()
    expected = [p.grad.clone() for p in injection.parameters() if p.grad is not None]
    model, injection, ids = llama("adalora")
    model.train()
    if way == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        runner: nn.Module = fully_shard(model)
    else:
        runner = DistributedDataParallel(model, find_unused_parameters=way == "ddp that looks for unused ones")
    for _ in range(2):
        runner.zero_grad()
        (runner(input_ids=mine(ids)).logits.square().mean() + injection.losses()).backward()
        found = [whole(p.grad) for p in injection.parameters() if p.grad is not None]
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- two ranks


Case = tuple[str, str]
"""A way and a method."""
CASES: dict[Case, Callable[[], None]] = {
    **{(way, method): functools.partial(check, way, method) for way in WAYS for method in METHODS},
    **{("bfloat16", method): functools.partial(check_bfloat16, method) for method in (*METHODS, "vera")},
    **{(f"llama, {way}", name): functools.partial(check_llama, way, name)
       for way in ("ddp", "fsdp") for name in LLAMA_METHODS},
    **{("own losses", way): functools.partial(check_own_losses, way)
       for way in ("ddp", "ddp that looks for unused ones", "fsdp")},
}  # fmt: skip


def begin() -> None:
    dist.init_process_group("gloo")
    init_device_mesh("cpu", (RANKS,))


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, str]:
    return outcomes_of(__name__)


def assert_right(outcomes: dict[Case, str], way: str) -> None:
    of_way = {method: wrong for (each, method), wrong in outcomes.items() if each == way}
    assert of_way.keys() == {method for each, method in CASES if each == way}
    assert not {method: wrong for method, wrong in of_way.items() if wrong}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_the_single_process(outcomes: dict[Case, str], way: str) -> None:
    assert_right(outcomes, way)


def test_gradients_in_bfloat16_are_near_those_of_the_single_process(outcomes: dict[Case, str]) -> None:
    assert_right(outcomes, "bfloat16")


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_gradients_of_methods_beyond_weights_equal_the_single_process(outcomes: dict[Case, str], way: str) -> None:
    assert_right(outcomes, f"llama, {way}")


def test_losses_that_are_taken_count_once_in_all_processes(outcomes: dict[Case, str]) -> None:
    assert_right(outcomes, "own losses")
