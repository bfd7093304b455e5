"""What `peftcore plan` says of a step, beside steps that are measured at widths that fit this machine, and of a model
that fits none: ``python -m benchmarks.plans [--page]``."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import peftcore
from benchmarks.memory import peak
from benchmarks.page import write
from peftcore.models.costs import Costs, Memory, costs
from peftcore.models.dry_run import RequestedMethod
from peftcore.models.example_inputs import Size
from peftcore.utils.numbers import size, work

METHODS = ("lora", "dora", "ia3", "houlsby_adapter", "ln_tuning")
WIDTHS = (128, 256, 512)
SMALL = Size(4, 64)
RESIDENT = 10_000
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
    return 2 * int(math.prod(left)) * int(right[-1])


def _attention(products: int, query: Any, key: Any) -> int:
    return products * 2 * int(math.prod(query)) * int(key[-2])


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
        return costs(folder, RequestedMethod(method, {}), batch, dtype, **more)


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


def steps() -> str:
    """Return a table of steps at several widths: planned, and measured."""
    lines = []
    for width, method, checkpointed in itertools.product(WIDTHS, METHODS, (False, True)):
        plan = planned(narrow(width), method, SMALL, "float32", checkpointed=checkpointed)
        most, flops = measured(narrow(width), method, SMALL, checkpointed)
        said, again = plan.memory.peak or 0, ", blocks run again" if checkpointed else ""
        exact = "equal" if plan.counted.adapted.flops == flops else f"**{plan.counted.adapted.flops:,}**"
        memory = size(said), size(most), f"{said / most:.3f}"
        lines.append((f"width {width}, `{method}`{again}", *memory, work(flops), exact))
        print(*lines[-1], flush=True)
    head = "a step of", "peak, planned", "peak, measured", "ratio", "operations, measured", "planned"
    return table(head, lines)


def large() -> str:
    """Return a table of what is planned for a model of 70 billion parameters."""
    lines = []
    for method in METHODS:
        began = time.monotonic()
        plan = planned(LARGE, method, Size(1, 512), "bfloat16", shards=8, adapters=RESIDENT)
        print(method, f"{time.monotonic() - began:.1f} s", flush=True)
        each = plan.sharded[0].total or 0
        adapters = size(plan.resident)
        lines.append((f"`{method}`", *numbers(plan.memory, plan.counted.adapted.flops), size(each), adapters))
    lines.append(("full fine-tuning", *numbers(plan.full, plan.counted.full.flops), "", ""))
    head = (
        *("", "gradients", "AdamW's states", "activations", "peak", "operations"),
        *("each of 8 processes", f"{RESIDENT:,} adapters"),
    )
    return table(head, lines)


def numbers(memory: Memory, flops: int | None) -> tuple[str, ...]:
    said = memory.gradients, memory.optimizer, memory.activations or 0, memory.peak or 0
    return (*map(size, said), work(flops or 0))


def residents(count: int, sites: int = 4) -> str:
    """Return what adapters take that are loaded for real on a small host: values, and what Python takes beside."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(sites)))
    each = peftcore.plan(model, "lora", rank=1, target="all-linear").resident
    with tempfile.TemporaryDirectory() as folder:
        first = peftcore.apply(model, "lora", rank=1, target="all-linear")
        first.save(f"{folder}/adapter")
        first.remove()
        before = psutil.Process().memory_info().rss
        for number in range(count):
            peftcore.load(model, f"{folder}/adapter", name=f"customer-{number}", active=False)
        beside = psutil.Process().memory_info().rss - before - count * each
        taken = peftcore.keep_within(model, "100GB", idle=f"{folder}/idle").bytes
    said = "as planned" if taken == count * each else f"**{count * each:,} planned**"
    return (
        f"{count:,} adapters of {sites} target modules: {taken:,} bytes of values, {said}; beside these, "
        f"{size(beside / count)} of memory for each adapter"
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---", *("---:" for _ in head[1:])], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="write docs/performance.md")
    parser.add_argument("--adapters", type=int, default=RESIDENT, help="adapters that are loaded for real")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tables = steps(), large(), residents(asked.adapters)
    print(*tables, sep="\n\n")
    if asked.page:
        write("python -m benchmarks.plans --page", *tables)


if __name__ == "__main__":
    main()
