"""TRL's trainers take a model of `peftcore.compat` for one of peft, and train it as they train peft's."""

import copy
import functools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from training_hosts import host

import peftcore
from peftcore.author import Operator
from peftcore.errors import ConfigError, SwapError, TrainingError
from peftcore.training.optimizer import transient

peft = pytest.importorskip("peft", reason="peft is not installed")
trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="datasets, which TRL reads, is not installed")
transformers = pytest.importorskip("transformers")
compat = pytest.importorskip("peftcore.compat")
training_state = pytest.importorskip("peftcore.compat.training_state")

CONFIG = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(37))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


def text(start: int) -> str:
    return " ".join(f"w{(start + step) % 37}" for step in range(5))


PAIRS = [{"prompt": text(i), "chosen": f" {text(i + 5)}", "rejected": f" {text(2 * i + 9)}"} for i in range(8)]
DATA = {
    "SFT": [{"text": text(i)} for i in range(8)],
    "DPO": PAIRS,
    "Reward": [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in PAIRS],
    "KTO": [{"prompt": text(i), "completion": f" {text(i + 5)}", "label": i % 2 == 0} for i in range(8)],
    "GRPO": [{"prompt": text(i)} for i in range(8)],
}
EXTRA: dict[str, Any] = {"GRPO": {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}}


def even_words(completions: list[str], **_: Any) -> list[float]:
    return [sum(int(word[1:]) % 2 == 0 for word in each.split() if word[1:].isdigit()) for each in completions]


def train(
    kind: str,
    model: Any,
    folder: Path,
    resume: bool = False,
    peft_config: Any = None,
    callbacks: Any = None,
    **changes: Any,
) -> list[dict[str, float]]:
    """Train in three steps; what was logged in each."""
    given = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(**{**given, **EXTRA.get(kind, {}), **changes}),
        train_dataset=datasets.Dataset.from_list(DATA[kind]),
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
        **({"reward_funcs": even_words} if kind == "GRPO" else {}),
    )
    torch.manual_seed(5)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def base(kind: str = "") -> Any:
    model: Any = host("llama")
    if kind != "Reward":
        return model
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config)


def noisy(model: Any) -> None:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def adapter_values(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.adapters["default"].state_dict().items()}


@pytest.mark.parametrize("kind", DATA)
def test_lora_trains_as_that_of_peft(kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(base(kind), copy.deepcopy(CONFIG))
    noisy(theirs)
    theirs.save_pretrained(str(tmp_path / "start"))
    ours = compat.PeftModel.from_pretrained(base(kind), tmp_path / "start", is_trainable=True)
    expected = train(kind, theirs, tmp_path / "theirs")
    found = train(kind, ours, tmp_path / "ours")
    assert len(found) == 3 and found[0]["grad_norm"] > 0
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2, abs=1e-5)
    written = peft.PeftModel.from_pretrained(base(kind), str(tmp_path / "ours" / "checkpoint-3"))
    trained = {name: value for name, value in theirs.named_parameters() if ".default." in name}
    for name, value in written.named_parameters():
        if ".default." in name:
            torch.testing.assert_close(value, trained[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", DATA)
def test_another_method_trains(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    model = compat.get_peft_model(base(kind), "dora", rank=4)
    plain, start = {key: value.clone() for key, value in base(kind).state_dict().items()}, adapter_values(model)
    train(kind, model, tmp_path, gradient_checkpointing=checkpointing)
    assert all(not torch.equal(value, start[key]) for key, value in adapter_values(model).items())
    assert all(torch.equal(value, plain[key]) for key, value in model.unload().state_dict().items())


@pytest.mark.parametrize("method", ["dora", "vera", "hira", CONFIG])
def test_the_reference_of_a_loaded_adapter_is_that_adapter(method: Any, tmp_path: Path) -> None:
    made = compat.get_peft_model(base(), copy.deepcopy(method))
    noisy(made)
    made.save_pretrained(tmp_path / "start")
    model = compat.PeftModel.from_pretrained(base(), tmp_path / "start", is_trainable=True)
    start = adapter_values(model)
    logs = train("DPO", model, tmp_path)
    assert logs[0]["rewards/margins"] == 0 and logs[0]["rewards/chosen"] == 0 and logs[1]["rewards/margins"] != 0
    assert list(model.peft_config) == ["default", "ref"] and model.active_adapters == ["default"]
    for key, value in model.adapters["ref"].state_dict().items():
        assert torch.equal(value, start[key])
    assert any(not torch.equal(value, start[key]) for key, value in adapter_values(model).items())


def test_the_reference_without_an_adapter_of_its_own_is_the_base(tmp_path: Path) -> None:
    from trl.trainer.utils import use_adapter

    model = compat.get_peft_model(base(), "dora", rank=4)
    noisy(model)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), use_adapter(model, None):
        assert torch.equal(model(input_ids=ids).logits, base()(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["dora", "houlsby_adapter", CONFIG])
def test_a_run_resumes_exactly(method: Any, tmp_path: Path) -> None:
    whole = compat.get_peft_model(base(), copy.deepcopy(method), seed=1)
    train("SFT", whole, tmp_path)
    resumed = compat.get_peft_model(base(), copy.deepcopy(method), seed=1)
    train("SFT", resumed, tmp_path, resume=True)
    for key, value in adapter_values(resumed).items():
        torch.testing.assert_close(value, adapter_values(whole)[key], rtol=0, atol=0)


def test_what_cannot_resume_is_refused_and_goes_on_from_its_files(tmp_path: Path) -> None:
    model = compat.get_peft_model(base(), "vera")  # whose files of peft hold what it draws
    train("SFT", model, tmp_path)
    with pytest.raises(SwapError):
        train("SFT", compat.get_peft_model(base(), "vera"), tmp_path, resume=True)
    loaded = compat.PeftModel.from_pretrained(base(), tmp_path / "checkpoint-2", is_trainable=True)
    train("SFT", loaded, tmp_path, resume=True)
    found, expected = dict(loaded.named_parameters()), dict(model.named_parameters())
    trained = [name for name, each in found.items() if each.requires_grad]
    assert trained
    for name in trained:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_reference_that_would_be_another_adapter_is_refused(tmp_path: Path) -> None:
    compat.get_peft_model(base(), "tinylora").save_pretrained(tmp_path / "start")
    model = compat.PeftModel.from_pretrained(base(), tmp_path / "start", is_trainable=True)
    keys = model.state_dict().keys()
    with pytest.raises(ConfigError, match="ref_model"):
        train("DPO", model, tmp_path)
    assert model.state_dict().keys() == keys


@pytest.mark.parametrize("name", ["lora", "head"])
def test_weights_for_vllm_are_merged_and_have_the_names_of_the_base(name: str, tmp_path: Path) -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    given = peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"] if name == "head" else None)
    theirs = peft.get_peft_model(base().double(), given).double()
    noisy(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = compat.PeftModel.from_pretrained(base().double(), tmp_path)

    def sent(model: Any) -> dict[str, Tensor]:
        there = SimpleNamespace(
            model=model, _dist=SimpleNamespace(is_fsdp=False, gather_params=lambda _: nullcontext())
        )
        there._fix_param_name_to_vllm = functools.partial(VLLMGeneration._fix_param_name_to_vllm, there)
        return {name: value.clone() for name, value in VLLMGeneration._iter_named_params(there)}

    expected, found = sent(theirs), sent(ours)
    plain = dict(base().double().named_parameters())
    assert found.keys() == expected.keys() == plain.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9)
    assert any(not torch.equal(value, plain[key]) for key, value in found.items())
    assert not any(injection.merged for injection in ours.adapters.values())


@pytest.mark.parametrize("options", [{"target": ["lm_head"]}, {"train": ["lm_head"]}])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO"])
def test_an_adapter_of_the_head_that_the_trainer_would_pass_over_is_refused(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = compat.get_peft_model(base(), "lora", **options)
    with pytest.raises(ConfigError, match="lm_head"):
        train(kind, model, tmp_path)


def test_the_head_of_a_reward_model_trains_along(tmp_path: Path) -> None:
    model = compat.get_peft_model(base("Reward"), "dora", train=["score"])
    start = adapter_values(model)
    train("Reward", model, tmp_path)
    assert "score.value" in start
    assert all(not torch.equal(value, start[key]) for key, value in adapter_values(model).items())


ADALORA = {"rank": 4, "target_rank": 1, "warmup": 1, "final": 1, "interval": 1, "seed": 1}


def test_a_schedule_resumes_exactly(tmp_path: Path) -> None:
    def values(resume: bool) -> dict[str, Tensor]:
        model = compat.get_peft_model(base(), "adalora", **ADALORA)
        callbacks = [peftcore.training.PeftcoreCallback()]
        train("SFT", model, tmp_path, resume=resume, callbacks=callbacks, max_steps=5)
        between = {f"between {name}": value.clone() for name, value in transient(model.adapters["default"])}
        return adapter_values(model) | between

    whole, resumed = values(False), values(True)
    assert whole.keys() == resumed.keys() and any((value == 0).any() for key, value in whole.items() if "E" in key)
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


def test_a_schedule_is_not_resumed_by_values_alone(tmp_path: Path) -> None:
    callbacks = [peftcore.training.PeftcoreCallback()]
    train("SFT", compat.get_peft_model(base(), "adalora", **ADALORA), tmp_path, max_steps=5, callbacks=callbacks)
    (tmp_path / "checkpoint-2" / training_state.FILE).unlink()
    with pytest.raises(TrainingError, match="schedule"):
        train("SFT", compat.get_peft_model(base(), "adalora", **ADALORA), tmp_path, resume=True, max_steps=5)


def test_a_schedule_that_nobody_drives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="PeftcoreCallback"):
        train("SFT", compat.get_peft_model(base(), "adalora", **ADALORA), tmp_path)


def test_the_dropout_of_an_adapter_is_turned_off_with_that_of_the_model(tmp_path: Path) -> None:
    def losses(name: str, dropout: float, **changes: Any) -> list[float]:
        model = compat.get_peft_model(base(), peft.LoraConfig(**{**CONFIG.to_dict(), "lora_dropout": dropout}), seed=1)
        noisy(model)
        return [each["loss"] for each in train("DPO", model, tmp_path / name, **changes)]

    plain = losses("plain", 0.0)
    assert losses("off", 0.3) == plain
    assert losses("on", 0.3, disable_dropout=False) != plain


def test_a_dropout_that_a_trainer_cannot_turn_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operator, "drop_nothing", lambda operator: False)
    model = compat.get_peft_model(base(), "lora", dropout=0.3)
    with pytest.raises(TrainingError, match="disable_dropout=False"):
        train("DPO", model, tmp_path)
    train("DPO", compat.get_peft_model(base(), "lora", dropout=0.3), tmp_path, disable_dropout=False)


@pytest.mark.parametrize("kind", DATA)
def test_a_trainer_takes_the_configuration_of_any_method(kind: str, tmp_path: Path) -> None:
    def losses(name: str, model: Any, **more: Any) -> list[float]:
        return [each["loss"] for each in train(kind, model, tmp_path / name, **more)]

    given = losses("given", compat.get_peft_model(base(kind), "dora", rank=4, seed=1))
    assert losses("made", base(kind), peft_config=compat.method_config("dora", rank=4, seed=1)) == given


@pytest.mark.parametrize("method", ["dora", "houlsby_adapter", "ia3", "oft", "prefix_tuning", "prompt_tuning", "vera"])
def test_the_head_of_trl_sees_what_the_adapter_does(method: str) -> None:
    """TRL runs the layers below the head by themselves: values and gradients are those of the whole model."""
    from trl.trainer.utils import add_fused_lm_head

    model = compat.get_peft_model(base(), method)
    noisy(model)
    model.eval()
    ids = torch.arange(3, 15).reshape(2, 6)

    def gradients(logps: Tensor) -> list[Tensor]:
        return [*torch.autograd.grad(logps.sum(), [each for each in model.parameters() if each.requires_grad])]

    whole = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = gradients(whole)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs",))
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(fused, whole, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients(fused), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
