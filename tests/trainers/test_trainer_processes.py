"""transformers' Trainer in two processes, DDP and FSDP2, with an adapted model and with one of `peftcore.compat`: the
losses and the adapter of one process, saved, and resumed."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RANKS, outcomes_of, shared_folder
from torch import Tensor

import peftcore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
]

TARGET = ["q_proj", "down_proj"]
STEPS = 2


def begin() -> None:
    dist.init_process_group("gloo")


@functools.cache
def folder() -> Path:
    return Path(shared_folder(tempfile.mkdtemp))


def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=32, initializer_range=0.2)
    )  # fmt: skip


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 32, (4 * STEPS * RANKS, 6), generator=generator)
    return [{"input_ids": each, "labels": each.clone()} for each in drawn]


def adapted(wrapped: bool) -> tuple[Any, peftcore.Injection]:
    from peftcore.compat import PeftModel

    model = base()
    injection = peftcore.apply(model, "dora", name="default", target=TARGET, rank=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in injection.parameters():
            each.add_(torch.randn(each.shape, generator=generator), alpha=0.1)
    return PeftModel(model) if wrapped else model, injection


def trained(where: Path, wrapped: bool, sharded: bool, resume: str | None = None) -> tuple[Any, Any]:
    """The trainer, and the adapter."""
    import transformers
    from accelerate.utils import DistributedType

    from peftcore.training import PeftcoreCallback

    model, injection = adapted(wrapped)
    cut = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    args = transformers.TrainingArguments(
        output_dir=str(where), per_device_train_batch_size=4 // RANKS, max_steps=STEPS, learning_rate=1e-2,
        use_cpu=True, report_to=[], save_steps=1, logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **(cut if sharded else {}),
    )  # fmt: skip
    if sharded:  # accelerate cuts nothing on processes without a device, unless it takes them for others
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    trainer = transformers.Trainer(model, args, train_dataset=rows(), callbacks=[PeftcoreCallback()])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, injection


@functools.cache
def reference() -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the adapter of one process, in a loop of its own."""
    model, injection = adapted(False)
    optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        ids = torch.stack([row["input_ids"] for row in rows()[4 * step : 4 * step + 4]])
        optimizer.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(injection.parameters(), 1.0) < 1  # by which the Trainer would divide
        optimizer.step()
        losses.append(float(loss))
    return losses, injection.state_dict()


def assert_right(where: Path) -> None:
    """What a folder has is what one process trains."""
    found = peftcore.load(base(), where).state_dict()
    expected = reference()[1]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def check(wrapped: bool, sharded: bool) -> None:
    where = folder() / f"{wrapped} {sharded}"
    for resume in (None, str(where / "out" / "checkpoint-1")):
        trainer, injection = trained(where / ("again" if resume else "out"), wrapped, sharded, resume)
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        assert losses == pytest.approx(reference()[0], abs=1e-4)
        own = where / f"own {resume is None}"
        if sharded or dist.get_rank() == 0:
            injection.save(own)
        trainer.save_model(str(where / f"saved {resume is None}"))
        dist.barrier()
        assert_right(own)
        assert_right(where / f"saved {resume is None}")
        assert_right(where / ("again" if resume else "out") / f"checkpoint-{STEPS}")


def clear() -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(folder())


CASES = {
    f"{'of compat' if wrapped else 'as it is'}, {'FSDP2' if sharded else 'DDP'}": functools.partial(
        check, wrapped, sharded
    )
    for wrapped in (False, True)
    for sharded in (False, True)
} | {"clear": clear}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__name__)


@pytest.mark.parametrize("case", CASES)
def test_two_processes(outcomes: dict[str, str], case: str) -> None:
    assert not outcomes[case]
