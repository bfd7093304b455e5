"""Multitask prompt tuning: the kit; the real peft with the same tensors and a task for each row; the host run on
embeddings that begin with the rows; beams; how it starts.

(peft is compared in a plain forward: its `generate` gives wrong text with the transformers versions that this project
is for.)"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from told_tasks import assert_beams_keep_the_tasks_of_their_rows
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, NotMergeable, RouteError
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS

LENGTH, TASKS, RANK = 4, 3, 2
OPTIONS = {"length": LENGTH, "tasks": TASKS, "rank": RANK}


@conformance("multitask_prompt_tuning", options={"*": {**OPTIONS, "task": 1}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def prompted(name: str, **options: Any) -> tuple[Any, Any, dict[str, Tensor], nn.Module]:
    """Base, host, inputs and operator, in float64; the tensors of the tasks as large as the prompt."""
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    base = model.double().eval().requires_grad_(False)
    model = deepcopy(base)
    injection = peftcore.apply(model, "multitask_prompt_tuning", **OPTIONS, dtype="float64", **options)
    (operator,) = injection.operators.values()
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_()
    return base, model, inputs, operator


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@against("peft 0.21", "multitask_prompt_tuning")
def test_peft(name: str) -> None:
    """Outputs and gradients. (By default peft puts rows in front of a decoder too; without them it takes the
    decoder's ids as labels only.)"""
    base, model, inputs, operator = prompted(name)
    if name == "t5":
        base.config.decoder_start_token_id = model.config.decoder_start_token_id = 0
        inputs["labels"] = inputs.pop("decoder_input_ids")
    plain = base(**inputs).logits
    config = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM",
        num_transformer_submodules=1,
        num_virtual_tokens=LENGTH,
        num_tasks=TASKS,
        num_ranks=RANK,
    )
    other = peft.get_peft_model(base, config).double().eval()
    encoder = other.prompt_encoder["default"]
    theirs = {"prompt": encoder.embedding.weight, "u": encoder.prefix_task_cols, "v": encoder.prefix_task_rows}
    seen = {"prompt": lambda t: t[:LENGTH], "u": lambda t: t[:, :LENGTH], "v": lambda t: t}
    with torch.no_grad():
        for key, tensor in theirs.items():
            seen[key](tensor).copy_(operator.get_parameter(key))
    tasks = [2, 0]
    with peftcore.call(model, task=tasks):
        ours = model(**inputs).logits
    expected = other(**inputs, task_ids=torch.tensor(tasks)).logits
    expected = expected if name == "t5" else expected[:, LENGTH:]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert (ours - plain).abs().max() > 1e-2
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for key, tensor in theirs.items():
        gradient = seen[key](tensor.grad)
        assert gradient.abs().max() > 0
        torch.testing.assert_close(operator.get_parameter(key).grad, gradient, rtol=1e-8, atol=1e-8)


def test_the_host_on_embeddings_that_begin_with_the_rows() -> None:
    base, model, inputs, operator = prompted("llama")
    for told, tasks in (([2, 0], [2, 0]), (torch.tensor([1, 2]), [1, 2]), (1, [1, 1])):
        rows = torch.stack([operator.prompt * torch.einsum("lr,rd->ld", operator.u[t], operator.v[t]) for t in tasks])
        embeds = torch.cat([rows, base.model.embed_tokens(inputs["input_ids"])], dim=1)
        mask = torch.cat([torch.ones(2, LENGTH, dtype=torch.long), inputs["attention_mask"]], dim=1)
        expected = base(inputs_embeds=embeds, attention_mask=mask).logits[:, LENGTH:]
        with peftcore.call(model, task=told):
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beams_keep_the_tasks_of_their_rows(name: str) -> None:
    _, model, inputs, _ = prompted(name)
    assert_beams_keep_the_tasks_of_their_rows(model, inputs["input_ids"], [2, 0])


def test_every_task_starts_at_the_shared_prompt() -> None:
    torch.manual_seed(0)
    model, _ = HOSTS["llama"].build()
    for rank in (1, 3):
        injection = peftcore.apply(model, "multitask_prompt_tuning", tasks=3, rank=rank, length=5, init_ids=[7, 3])
        (operator,) = injection.operators.values()
        assert torch.equal(operator.prompt, model.model.embed_tokens.weight[torch.tensor([7, 3, 7, 3, 7])])
        assert torch.equal(operator.u @ operator.v, torch.ones(3, 5, 16))
        injection.remove()
    assert operator.u[..., 1:].std() > 0.01  # or all columns would learn the same
    injection = peftcore.apply(model, "multitask_prompt_tuning", length=50, init="uniform", task_init="normal")
    (operator,) = injection.operators.values()
    assert 0.25 < operator.prompt.std() < 0.33 and operator.prompt.abs().max() <= 0.5
    assert (operator.u @ operator.v).abs().max() < 0.01 and operator.u.std() > 0.015


def test_what_is_refused() -> None:
    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model, "multitask_prompt_tuning", length=2, tasks=["rte", "sst"])
    with pytest.raises(MissingContext, match=r"peftcore\.call\(model, task="):
        model(**inputs)
    for told, error in ((2, ConfigError), ("mrpc", ConfigError), ([0, 1, 1], RouteError)):
        with pytest.raises(error), peftcore.call(model, task=told):
            model(**inputs)
    with peftcore.call(model, task="sst"):
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(ConfigError, match="40"):
        peftcore.apply(model, "multitask_prompt_tuning", name="other", init_ids=[3, 40])
