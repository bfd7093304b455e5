"""Models that transformers has quantized: recognized as they come, trained by its Trainer, saved by it, merged."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from training_hosts import STEPS, trainer

import peftcore
from peftcore.testing.hosts import VOCABULARY
from peftcore.training import PeftcoreCallback

Load = Callable[[], transformers.PreTrainedModel]


def bnb_4bit() -> Any:
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def bnb_8bit() -> Any:
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


@functools.cache
def _config() -> transformers.LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes)


@pytest.fixture(params=[bnb_4bit, bnb_8bit, torchao_int8], ids=lambda make: make.__name__)
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Load:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(_config()).save_pretrained(tmp_path / "dense")

    def loaded() -> transformers.PreTrainedModel:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=request.param(), device_map="cpu"
        )

    return loaded


def adapted(load: Load, method: str) -> tuple[transformers.PreTrainedModel, peftcore.Injection]:
    model = load()
    return model, peftcore.apply(model, method, seed=0)


def answers(model: nn.Module) -> torch.Tensor:
    """In training mode: in evaluation a base without adapters may take a kernel of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.randint(3, VOCABULARY, (2, 6), generator=generator)).logits
    return logits


def test_the_trainer_refuses_without_the_callback_and_the_model_says_nothing_otherwise(
    load: Load, tmp_path: Path
) -> None:
    model, injection = adapted(load, "lora")
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, "llama", tmp_path, [])
    made = trainer(model, "llama", tmp_path, [PeftcoreCallback()])
    assert not model._hf_peft_config_loaded
    made.train()
    assert not model._hf_peft_config_loaded
    with pytest.raises(ValueError, match="purely quantized"):  # the callback before has its Trainer
        trainer(model, "llama", tmp_path, [])
    injection.remove()
    assert "_hf_peft_config_loaded" not in vars(model)
    with pytest.raises(ValueError, match="purely quantized"):  # nothing trains there
        trainer(model, "llama", tmp_path, [PeftcoreCallback()])


def test_a_callback_that_was_made_before_the_adapter(load: Load, tmp_path: Path) -> None:
    callback = PeftcoreCallback()
    model, injection = adapted(load, "lora")
    start = {key: value.clone() for key, value in injection.state_dict().items()}
    trainer(model, "llama", tmp_path, [callback]).train()
    assert all(not torch.equal(value, start[key]) for key, value in injection.state_dict().items())


def test_a_callback_that_is_gone_admits_nothing(load: Load, tmp_path: Path) -> None:
    model, _ = adapted(load, "lora")
    PeftcoreCallback()
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, "llama", tmp_path, [])


def test_a_quantized_model_of_which_a_part_is_adapted(load: Load, tmp_path: Path) -> None:
    model = load()
    injection = peftcore.apply(model.model, "lora", seed=0)
    made = trainer(model, "llama", tmp_path, [PeftcoreCallback(model)])
    assert "_hf_peft_config_loaded" not in vars(model)
    start = {key: value.clone() for key, value in injection.state_dict().items()}
    made.train()
    assert all(not torch.equal(value, start[key]) for key, value in injection.state_dict().items())


@pytest.mark.share(3)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_it_trains_evaluates_resumes_and_leaves_the_codes_alone(load: Load, method: str, tmp_path: Path) -> None:
    """With an evaluation between, after which bitsandbytes' 4-bit modules would have no gradient on some processors."""
    base = answers(load().train())
    model, whole = adapted(load, method)
    start = {key: value.clone() for key, value in whole.state_dict().items()}
    changes = {"eval_strategy": "steps", "eval_steps": 2}
    trainer(model, "llama", tmp_path, [PeftcoreCallback()], **changes).train()
    assert all(not torch.equal(value, start[key]) for key, value in whole.state_dict().items())
    with whole.disabled():
        assert torch.equal(answers(model.train()), base)

    again, resumed = adapted(load, method)
    run = trainer(again, "llama", tmp_path, [PeftcoreCallback()], **changes)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_checkpoints_hold_the_adapter_and_the_saved_model_is_the_quantized_base(load: Load, tmp_path: Path) -> None:
    model, injection = adapted(load, "lora")
    made = trainer(model, "llama", tmp_path, [PeftcoreCallback()])
    made.train()
    saved = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert len(saved) == len(injection.state_dict())
    made.save_model(str(tmp_path / "base"))
    clean = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
    with injection.disabled():
        assert torch.equal(answers(clean.train()), answers(model.train()))
    injection.save(tmp_path / "adapter")
    peftcore.load(clean, tmp_path / "adapter")
    assert torch.equal(answers(clean.train()), answers(model.train()))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_was_trained_merges_into_a_dense_model(load: Load, method: str, tmp_path: Path) -> None:
    model, injection = adapted(load, method)
    trainer(model, "llama", tmp_path, [PeftcoreCallback()]).train()
    expected = answers(model.train())
    report = injection.merge()
    packed_inputs = "8bitlt" in type(load().model.layers[0].self_attn.q_proj).__name__.lower()
    difference = (answers(model) - expected).norm() / expected.norm()
    assert difference < (0.02 if packed_inputs else 1e-5)
    assert set(report.dense) == {site.module_path for site in injection.sites}
    assert all(
        type(site.module).__name__ == "Linear" and site.module.weight.is_floating_point() for site in injection.sites
    )
