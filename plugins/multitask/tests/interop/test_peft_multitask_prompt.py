"""Multitask prompt tuning in folders of peft, both ways, with a task for each row."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft_folders import assert_reads, assert_writes, saved_by_peft
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
LENGTH, TASKS, RANK = 4, 3, 2
OPTIONS = {"length": LENGTH, "tasks": TASKS, "rank": RANK}
TOLD = [2, 0]


def host(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A host, and its logits without those of peft's rows in front. (Peft takes a decoder's ids as labels only.)"""
    base, inputs = HOSTS[name].build()
    if name == "t5":
        base.config.decoder_start_token_id = 0
        inputs["labels"] = inputs.pop("decoder_input_ids")
    words = inputs["labels" if name == "t5" else "input_ids"].shape[1]

    def run(model: nn.Module) -> Tensor:
        if isinstance(model, peft.PeftModel):
            return model(**inputs, task_ids=torch.tensor(TOLD)).logits[:, -words:]
        if not peftcore.injections(model):
            return model(**inputs).logits
        with peftcore.call(model, task=TOLD):
            return model(**inputs).logits

    return base, run


def larger(model: nn.Module) -> None:
    """What tells the tasks apart as large as the prompt, so that the rows are no zeros."""
    for name, parameter in model.named_parameters():
        if "prefix_task" in name:
            parameter.data.mul_(10)


def config(name: str, stacks: int) -> peft.MultitaskPromptTuningConfig:
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    return peft.MultitaskPromptTuningConfig(
        task_type=task, num_transformer_submodules=stacks, num_virtual_tokens=LENGTH, num_tasks=TASKS, num_ranks=RANK
    )


@pytest.mark.parametrize(("name", "stacks"), [("llama", 1), ("gpt2", 1), ("t5", 1), ("t5", 2)])
def test_both_ways(name: str, stacks: int, tmp_path: Path) -> None:
    base, run = host(name)
    injection = assert_reads(base, config(name, stacks), run, tmp_path, larger)
    assert len(injection.operators) == stacks
    if stacks == 2:
        injection.save(tmp_path / "back", format="peft")
        theirs = peft.PeftModel.from_pretrained(host(name)[0], str(tmp_path / "back")).eval()
        theirs.base_model.load_state_dict(base.state_dict())
        torch.testing.assert_close(run(theirs), run(injection.model), rtol=1e-5, atol=1e-5)
    else:
        written = assert_writes(base, "multitask_prompt_tuning", OPTIONS, run, tmp_path)
        assert written["num_transformer_submodules"] == stacks


def test_names_of_tasks_are_counted(tmp_path: Path) -> None:
    base, run = host("llama")
    options = {**OPTIONS, "tasks": ["rte", "sst", "mrpc"]}
    assert assert_writes(base, "multitask_prompt_tuning", options, run, tmp_path)["num_tasks"] == 3


def test_refusals(tmp_path: Path) -> None:
    base, _ = host("t5")
    injection = peftcore.apply(base, "multitask_prompt_tuning", **OPTIONS, target=["encoder", "decoder"])
    nn.init.normal_(injection.operators["decoder:sequence"].v)
    with pytest.raises(ExportError, match="one v for encoder and decoder"):
        injection.save(tmp_path / "two", format="peft")
    base, _ = host("llama")
    saved_by_peft(base, config("llama", 1), tmp_path / "tasks")
    file = tmp_path / "tasks" / "adapter_config.json"
    file.write_text(file.read_text().replace('"num_tasks": 3', '"num_tasks": 4'))
    with pytest.raises(CheckpointError, match=r"prefix_task_cols has shape \(3, 4, 2\), expected \(4, 4, 2\)"):
        peftcore.load(base, tmp_path / "tasks")
