"""What a plan says of a step, held against steps that are measured: memory by the allocator, operations by torch's
counter, and both by hand."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from looking import folder_of
from rich.console import Console
from slowly import quick
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import peftcore
from peftcore.cli.inspection.costs_page import page
from peftcore.errors import BadInput
from peftcore.models.costs import Costs, costs
from peftcore.models.dry_run import RequestedMethod
from peftcore.models.example_inputs import Size

ROWS, LENGTH, VOCABULARY, LAYERS = 3, 40, 500, 2
METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "ia3": {},
    "houlsby_adapter": {},
    "ln_tuning": {},
    "sapt": {"tasks": 6},
}
LLAMA_3_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def shape(width: int) -> dict[str, Any]:
    """The proportions of Llama 3 70B."""
    return {
        **LLAMA_3_70B,
        "hidden_size": width,
        "intermediate_size": width * 7 // 2,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
    }


def planned(folder: Path, given: Mapping[str, Any], method: str, size: Size, dtype: str, **more: Any) -> Costs:
    config = {**transformers.LlamaConfig(**given).to_dict(), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return costs(str(folder), RequestedMethod(method, METHODS.get(method, {})), size, dtype, **more)


# ---------------------------------------------------------------- measured


class Measured:
    """A model with random weights, that takes steps of AdamW."""

    def __init__(self, width: int, method: str | None, checkpointed: bool) -> None:
        torch.manual_seed(0)
        self.model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape(width))).train()
        if method is not None:
            peftcore.apply(self.model, method, **METHODS[method])
        if checkpointed:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad])
        self.ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
        self.step()  # from here on AdamW has its states

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak(self) -> int:
        """The most bytes at once: those that were there, and what the allocator gave and took back."""
        held = [*self.model.parameters(), *self.model.buffers(), self.ids]
        held += [each for state in self.optimizer.state.values() for each in state.values()]
        now = most = sum(each.nbytes for each in held)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.step()
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most

    def flops(self) -> int:
        with FlopCounterMode(display=False, custom_mapping=PASSED_OVER) as counter:
            self.step()
        return counter.get_total_flops()


aten = torch.ops.aten
PASSED_OVER: dict[Any, Any] = {
    aten.addmm_: lambda _, left, right, **__: 2 * math.prod(left) * right[-1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, *_, **__: 4 * math.prod(query) * key[-2],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, query, key, *__, **___: (
        10 * math.prod(query) * key[-2]
    ),
}
"""What torch's counter does not know: products that are added in place, and attention on a CPU."""

CASES = [(width, name, again) for width in (64, 128, 256) for name in METHODS for again in (False, True)]
QUICK = [(64, "lora", False), (128, "dora", True)]


@pytest.mark.parametrize(("width", "method", "checkpointed"), quick(CASES, QUICK))
def test_a_step_takes_what_is_planned(width: int, method: str, checkpointed: bool, tmp_path: Path) -> None:
    """Of the peak within two percent, also of what is beyond the weights; it is to the byte but where blocks run
    again."""
    plan = planned(tmp_path, shape(width), method, Size(ROWS, LENGTH), "float32", checkpointed=checkpointed)
    real = Measured(width, method, checkpointed)
    peak = real.peak()
    assert plan.memory.peak is not None and plan.memory.total is not None
    assert plan.memory.peak == pytest.approx(peak, rel=0.02)
    assert plan.memory.peak - plan.memory.weights == pytest.approx(peak - plan.memory.weights, rel=0.02)
    assert plan.counted.adapted.flops == real.flops()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_so_does_one_of_full_fine_tuning(checkpointed: bool, tmp_path: Path) -> None:
    plan = planned(tmp_path, shape(128), "lora", Size(ROWS, LENGTH), "float32", checkpointed=checkpointed)
    real = Measured(128, None, checkpointed)
    assert plan.full.peak == pytest.approx(real.peak(), rel=0.05)  # AdamW's own tensors, of the largest parameter
    assert plan.counted.full.flops == real.flops()


# ---------------------------------------------------------------- by hand


def products(given: Mapping[str, Any], tokens: int, length: int) -> tuple[int, int]:
    """The operations of one forward of a Llama by hand: those of its matrices, and those of attention."""
    width, inner = given["hidden_size"], given["intermediate_size"]
    keys = width * given["num_key_value_heads"] // given["num_attention_heads"]
    block = 2 * width * width + 2 * width * keys + 3 * width * inner
    matrices = given["num_hidden_layers"] * block + width * given["vocab_size"]
    return 2 * tokens * matrices, given["num_hidden_layers"] * 4 * tokens * length * width


def test_operations_by_hand(tmp_path: Path) -> None:
    """Full fine-tuning multiplies with each matrix once forward and twice backward, and attention takes five products
    in its backward, of which its forward has two; nothing needs the gradient of the embeddings by a product."""
    plan = planned(tmp_path, shape(64), "lora", Size(ROWS, LENGTH), "float32")
    matrices, attention = products(shape(64), ROWS * LENGTH, LENGTH)
    assert plan.counted.full.flops == 3 * matrices + attention * 7 // 2


def test_frozen_values_of_an_adapter_have_no_gradients_and_no_states(tmp_path: Path) -> None:
    """Five of six tasks' LoRAs stand still."""
    plan = planned(tmp_path, shape(64), "sapt", Size(ROWS, LENGTH), "float32")
    trained, memory = plan.recorded.plan.trainable, plan.memory
    assert 0 < trained < plan.recorded.plan.parameters
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)
    assert memory.adapter == 4 * plan.recorded.plan.parameters
    told = plan.as_dict()
    assert (told["trainable"], told["frozen"]) == (trained, plan.recorded.plan.frozen)
    assert sum(each["trainable"] for each in (*told["sites"], *told["shared"])) == trained
    console = Console(width=120)
    with console.capture() as shown:
        console.print(page(plan))
    assert f"{plan.recorded.plan.frozen:,} frozen in the adapter" in shown.get()


@pytest.mark.slow
def test_a_model_of_seventy_billion_parameters(tmp_path: Path) -> None:
    """Its size is that of the file that Meta published (model.safetensors.index.json: 141,107,412,992 bytes)."""
    plan = planned(tmp_path, LLAMA_3_70B, "lora", Size(1, 128), "bfloat16", shards=8, adapters=10_000)
    assert plan.recorded.plan.total == 70_553_706_496
    buffers = 64 * 4  # inverse frequencies, and those of before
    assert 141_107_412_992 <= plan.memory.weights <= 141_107_412_992 + 2 * buffers
    rank, layers, width, keys = 8, 80, 8192, 1024
    trained = layers * rank * (width + width + width + keys)
    assert plan.recorded.plan.trainable == trained
    assert (plan.memory.gradients, plan.memory.optimizer) == (4 * trained, 8 * trained)
    assert plan.resident == 10_000 * 4 * trained
    matrices, attention = products(LLAMA_3_70B, 128, 128)
    assert plan.counted.full.flops == 3 * matrices + attention * 7 // 2
    assert plan.full.gradients == 141_107_412_992
    assert [each.optimizer for each in plan.sharded] == [trained] * 8
    assert plan.memory.peak is not None and plan.memory.activations is not None
    assert plan.memory.peak > plan.memory.weights + plan.memory.activations


# ---------------------------------------------------------------- what is not known


def test_blocks_that_do_not_run_again_are_said(tmp_path: Path) -> None:
    vit = str(folder_of("vit", tmp_path))
    with pytest.raises(BadInput, match="does not support gradient checkpointing"):
        costs(vit, RequestedMethod("lora", {}), Size(2), checkpointed=True)


def test_peak_of_a_process_is_not_told(tmp_path: Path) -> None:
    """What is on its way between processes depends on what carries it."""
    plan = planned(tmp_path, shape(64), "lora", Size(ROWS, LENGTH), "float32", shards=2)
    assert [each.peak for each in plan.sharded] == [None, None]
    [first, _] = plan.sharded
    assert first.gathered > 0 and first.activations == plan.memory.activations
    assert first.total == sum((first.weights, first.adapter, first.gradients, first.optimizer, first.gathered)) + (
        first.activations or 0
    )
    assert plan.memory.gathered == 0
