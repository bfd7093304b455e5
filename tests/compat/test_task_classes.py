"""Models are of peft's classes for tasks, which trainers ask for."""

import copy
from pathlib import Path

import pytest
import torch
from training_hosts import host

peft = pytest.importorskip("peft")
compat = pytest.importorskip("peftcore.compat")
tasks = pytest.importorskip("peftcore.compat.task_classes")

HOSTS = {
    "llama": (peft.PeftModelForCausalLM, "CAUSAL_LM"),
    "t5": (peft.PeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "bert": (peft.PeftModelForSequenceClassification, "SEQ_CLS"),
}


@pytest.mark.parametrize("name", HOSTS)
def test_the_class_is_that_for_the_model_or_for_its_configuration(name: str, tmp_path: Path) -> None:
    kind, task = HOSTS[name]
    ours = tasks.get_peft_model(host(name), "dora")
    assert isinstance(ours, kind) and isinstance(ours, compat.PeftModel)
    config = peft.LoraConfig(r=2, task_type=task)
    theirs = peft.get_peft_model(host(name), copy.deepcopy(config))
    assert type(theirs) is kind
    theirs.save_pretrained(str(tmp_path))
    for found in (tasks.get_peft_model(host(name), config), compat.PeftModel.from_pretrained(host(name), tmp_path)):
        assert isinstance(found, kind)
    plain = tasks.get_peft_model(host(name), peft.LoraConfig(r=2, target_modules=["q_proj", "q", "query"]))
    assert not isinstance(plain, kind)  # as peft, which asks the configuration alone


def test_a_model_for_a_task_generates_as_the_adapted_model_does() -> None:
    ours = tasks.get_peft_model(host("llama"), "lora", seed=2)
    torch.manual_seed(0)
    for parameter in ours.adapters["default"].parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    ids = torch.arange(3, 9)[None]
    options = {"max_new_tokens": 5, "do_sample": False}
    found = ours.eval().generate(input_ids=ids, **options)
    assert torch.equal(found, ours.get_base_model().generate(input_ids=ids, **options))
    assert ours.prepare_inputs_for_generation(ids, is_first_iteration=True)["input_ids"].shape == ids.shape
    with ours.disable_adapter():
        assert torch.equal(ours.generate(input_ids=ids, **options), host("llama").eval().generate(ids, **options))
