"""DeepSpeed's ZeRO in two processes trains as one process does, and saves whole; what would be lost is refused.

DeepSpeed is in no list of requirements, since it makes a library of its own as it is first used on a CPU, for more than
a minute; here it goes without. To run this: ``DS_BUILD_OPS=0 pip install deepspeed`` (seconds), then
``pytest tests/torch_interop/test_deepspeed.py``.
"""

import functools
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from interop_hosts import adapt, encoder, inputs
from ranks import RANKS, outcomes_of, shared_folder
from torch import Tensor, nn

import peftcore
from peftcore.errors import (
    ExportError,
    HostMismatch,
    MergeError,
    PeftcoreError,
    SwapError,
    TrainingError,
    UnsupportedHost,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed (DS_BUILD_OPS=0 pip install deepspeed); see tests/layers/test_pieces.py",
    ),
]

METHODS = ("lora", "dora", "oft", "houlsby_adapter", "bitfit")
ALL_CUT = 0
"""DeepSpeed leaves parameters of fewer values whole, by default."""
STEPS = 2


def begin() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.utils.logging.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")


@functools.cache
def folder() -> Path:
    return Path(shared_folder(tempfile.mkdtemp))


def config(stage: int, threshold: int = ALL_CUT) -> dict[str, Any]:
    return {
        "train_batch_size": 2 * RANKS,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": threshold},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, injection: peftcore.Injection, **options: Any) -> Any:
    import deepspeed

    trained = [each for each in injection.parameters() if each.requires_grad]
    return deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trained, config=config(**options))[0]


def adamw(injection: peftcore.Injection) -> torch.optim.Optimizer:
    return torch.optim.AdamW(injection.parameters(), lr=1e-2)


def step(engine: Any) -> None:
    engine.backward(engine(inputs().chunk(RANKS)[dist.get_rank()]).square().mean())
    engine.step()


def reference(method: str, steps: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model that one process trained, and its adapter."""
    model = encoder()
    injection = adapt(model, method)
    optimizer = adamw(injection)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(each).square().mean() for each in inputs().chunk(RANKS)).div(RANKS).backward()
        optimizer.step()
    return model, injection.state_dict()


def made_in_pieces() -> nn.Module:
    """The model of `encoder`, cut apart as it was made."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        model = encoder()
    with deepspeed.zero.GatheredParameters([*model.parameters()], modifier_rank=0):
        if dist.get_rank() == 0:
            model.load_state_dict(encoder().state_dict())
    assert all(each.shape == (0,) for each in model.parameters())
    return model


def assert_saved(where: Path, expected: dict[str, Tensor]) -> None:
    dist.barrier()
    found = peftcore.load(encoder(), where).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


def check(way: str, method: str) -> None:
    """Train, save after each step, go on; then evaluate."""
    model = made_in_pieces() if way == "zero.Init" else encoder()
    injection = adapt(model, method)
    stage, threshold = {"stage 2": (2, ALL_CUT), "stage 3, small ones whole": (3, 10**5)}.get(way, (3, ALL_CUT))
    engine = engine_of(model, adamw(injection), injection, stage=stage, threshold=threshold)
    for done in range(1, STEPS + 1):
        step(engine)
        where = folder() / f"{way} {method} {done}"
        if stage == 3 or dist.get_rank() == 0:
            injection.save(where)
        trained, expected = reference(method, done)
        assert_saved(where, expected)
    engine.eval()
    with torch.no_grad():
        torch.testing.assert_close(engine(inputs()), trained.eval()(inputs()))
        with injection.disabled():
            torch.testing.assert_close(engine(inputs()), encoder().eval()(inputs()))


def check_resumed(way: str, method: str) -> None:
    """A saved adapter is loaded before DeepSpeed gets the model, and trains on."""
    where = folder() / f"resumed {way} {method}"
    if dist.get_rank() == 0:
        adapt(encoder(), method).save(where)
    dist.barrier()
    model = made_in_pieces() if way == "zero.Init" else encoder()
    injection = peftcore.load(model, where, trainable=True)
    engine = engine_of(model, adamw(injection), injection, stage=2 if way == "stage 2" else 3)
    step(engine)
    if way != "stage 2" or dist.get_rank() == 0:
        injection.save(where)
    assert_saved(where, reference(method, 1)[1])


def check_refused() -> None:
    """What DeepSpeed would not see, or would overwrite."""
    model, where = encoder(), folder() / "refused"
    injection = adapt(model, "lora")
    step(engine_of(model, adamw(injection), injection, stage=3))
    injection.save(where)
    dist.barrier()
    other = peftcore.load(encoder(), where)
    refused: list[tuple[Any, type[PeftcoreError], str]] = [
        (injection.state_dict, ExportError, "call save"),
        (injection.merge, MergeError, "outside of DeepSpeed"),
        (injection.bake, MergeError, "outside of DeepSpeed"),
        (lambda: injection.swap(other), SwapError, "before deepspeed.initialize"),
        (lambda: peftcore.apply(model, "lora", name="late"), UnsupportedHost, "before deepspeed.initialize"),
        (lambda: peftcore.plan(model, "lora"), UnsupportedHost, "before deepspeed.initialize"),
        (lambda: peftcore.load(model, where, name="late"), HostMismatch, "before deepspeed.initialize"),
    ]
    for call, error, words in refused:
        with pytest.raises(error, match=words):
            call()
    import deepspeed

    with deepspeed.zero.GatheredParameters([*injection.parameters()]):  # as the error says
        assert all(each.numel() for each in injection.state_dict().values())


def check_schedules(stage: int, method: str) -> None:
    """What a method changes between steps would be lost in DeepSpeed's copies."""
    model = encoder()
    injection = peftcore.apply(model, method)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=4)
    with pytest.raises(TrainingError, match="DeepSpeed"):
        step(engine_of(model, optimizer, injection, stage=stage))


def clear() -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(folder())


WAYS = {
    "stage 2": ("lora", "dora"),
    "stage 3": METHODS,
    "stage 3, small ones whole": ("dora",),
    "zero.Init": ("lora", "dora", "bitfit"),
}
CASES = {
    "refused": check_refused,
    **{f"{method} in stage {stage}": functools.partial(check_schedules, stage, method)
       for stage in (2, 3) for method in ("adalora", "galore")},
    **{f"resumed, {way}": functools.partial(check_resumed, way, "dora") for way in ("stage 2", "stage 3", "zero.Init")},
    **{f"{way}, {method}": functools.partial(check, way, method)
       for way, methods in WAYS.items() for method in methods},
    "clear": clear,
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__name__)


@pytest.mark.parametrize("case", CASES)
def test_two_processes(outcomes: dict[str, str], case: str) -> None:
    assert not outcomes[case]
