"""What `peftcore plan` says of a step, beside steps that are measured at widths that fit this machine, and of a model
that fits none: ``python -m benchmarks.plans [--page]``."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import peftcore
from benchmarks.memory import peak
from benchmarks.page import write
from peftcore.comparing.models.example_inputs import Size
from peftcore.comparing.numbers import size, work
from peftcore.comparing.plans.costs import STATES, Costs, costs
from peftcore.comparing.plans.recorded import Wanted

METHODS = ("lora", "dora", "ia3", "houlsby_adapter", "ln_tuning")
WIDTHS = (128, 256)
SMALL = Size(4, 64)
LARGE: Mapping[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
"""Of Llama 3 70B."""


aten = torch.ops.aten


def _added(_: Any, left: Any, right: Any, **__: Any) -> int:
    return 2 * math.prod(left) * int(right[-1])


def _attention(products: int, query: Any, key: Any) -> int:
    return products * 2 * math.prod(query) * int(key[-2])


PASSED_OVER: Mapping[Any, Any] = {
    aten.addmm_: _added,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, *_, **__: _attention(2, query, key),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, query, key, *__, **___: _attention(
        5, query, key
    ),
}
"""What torch's counter does not count by itself: products that are added in place, attention on a CPU."""


def narrow(width: int) -> Mapping[str, Any]:
    """Return the same proportions at another width, with four layers."""
    return {
        **LARGE,
        "hidden_size": width,
        "intermediate_size": width * 7 // 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "vocab_size": 1000,
    }


def planned(shape: Mapping[str, Any], method: str, batch: Size, dtype: str, **more: Any) -> Costs:
    with tempfile.TemporaryDirectory() as folder:
        config = {**transformers.LlamaConfig(**shape).to_dict(), "architectures": ["LlamaForCausalLM"]}
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return costs(folder, Wanted(method, {}), batch, dtype, **more)


def measured(shape: Mapping[str, Any], method: str, batch: Size, checkpointed: bool) -> tuple[int, int]:
    """Return the most bytes that a step of AdamW takes, as the allocator counts them, and its operations."""
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).train()
    injection = peftcore.apply(model, method)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(injection.parameters())
    ids = torch.randint(0, shape["vocab_size"], (batch.batch, batch.length or 0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # from here on AdamW has its states
    held = [*model.parameters(), *model.buffers(), ids, ids]
    held += [each for state in optimizer.state.values() for each in state.values()]
    most = peak(step) + sum(each.nbytes for each in held)
    with FlopCounterMode(display=False, custom_mapping=dict(PASSED_OVER)) as counter:
        step()
    return most, counter.get_total_flops()


def rows() -> Iterator[tuple[str, ...]]:
    for width in WIDTHS:
        for method in METHODS:
            for checkpointed in (False, True):
                plan = planned(narrow(width), method, SMALL, "float32", checkpointed=checkpointed)
                most, flops = measured(narrow(width), method, SMALL, checkpointed)
                said, work_said = plan.memory.peak or 0, plan.counted.adapted.flops
                exact = "equal" if work_said == flops else f"**{work_said:,}**"
                again = ", blocks run again" if checkpointed else ""
                yield f"{width}, `{method}`{again}", size(said), size(most), f"{said / most:.3f}", f"{flops:,}", exact
                print(*(f"{width}, `{method}`{again}", size(said), size(most), f"{said / most:.3f} {(said-plan.memory.weights)/(most-plan.memory.weights):.3f}", f"{flops:,}", exact), flush=True)


for _ in rows(): pass
